"""The poster's alternation: every part of an iteration climbs, and pruning comes after."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from bayes_svdo.inference.exact_regression import fit_vdard_regression
from bayes_svdo.inference.exact_regression_alternation import alternate, prune
from bayes_svdo.inference.exact_regression_ascent import start
from bayes_svdo.inference.exact_regression_curves import KL
from bayes_svdo.inference.exact_regression_data import natural_units, problems_of

pytestmark = pytest.mark.usefixtures("torch_arrays")

KLS = get_args(KL)


def ridge_start(data, kl="exact", kl_weight=1.0):
    x, y = data
    units = natural_units(x[None], y[None], True)
    problems = problems_of(units, len(y) - 1, kl_weight, None, 0.0, kl)
    return problems, start(problems, ("ridge",))


@pytest.mark.parametrize("kl", KLS)
def test_the_alternation_reaches_the_same_optimum_in_more_iterations(kl: KL, problem) -> None:
    x, y = problem(num=200, dim=15, correlation=0.3)
    joint = fit_vdard_regression(x, y, kl=kl, kl_weight="bic")
    slow = fit_vdard_regression(x, y, kl=kl, kl_weight="bic", method="alternating")
    assert torch.equal(slow.kept, joint.kept)
    assert torch.allclose(slow.elbo, joint.elbo, rtol=0, atol=1e-5)
    assert torch.allclose(slow.loc, joint.loc, atol=1e-4)
    assert slow.n_iter > joint.n_iter
    assert slow.starts == ("ols",)


@pytest.mark.parametrize("kl", KLS)
def test_every_part_of_an_iteration_raises_the_elbo(kl: KL, problem) -> None:
    problems, state = ridge_start(problem(num=60, dim=20, correlation=0.9), kl)
    last = state.elbo
    for _ in range(50):
        state, objectives = alternate(problems, state)
        for elbo in objectives:  # after alpha, loc and beta
            assert (elbo >= last - 1e-11).all()
            last = elbo
        assert torch.equal(objectives[-1], state.elbo)


def test_an_irrelevant_weight_shrinks_by_a_constant_factor_and_never_to_zero() -> None:
    """Alone, with known noise, loc falls by the factor |z| in every iteration once it is small."""
    x = torch.eye(20, 1, dtype=torch.float64)
    y = torch.linspace(-1, 1, 20, dtype=torch.float64)
    y[0] = 0.5  # z, at a noise of precision 1
    units = natural_units(x[None], y[None], False)
    precision = units.y_scale[:, None].square()
    problems = problems_of(units, 20, 1.0, precision, 0.0, "exact")
    state = start(problems, ("ridge",))
    locs = []
    for _ in range(30):
        state, _ = alternate(problems, state)
        locs.append(float(state.loc))
    assert 0 < locs[-1] < 1e-8
    assert locs[-1] / locs[-2] == pytest.approx(0.5, rel=1e-3)


def test_pruning_leaves_what_is_relevant_and_never_lowers_the_elbo(problem) -> None:
    problems, state = ridge_start(problem(num=200, dim=15, correlation=0.3), kl_weight=5.0)
    for _ in range(500):
        state, _ = alternate(problems, state)
    pruned = prune(problems, state)
    kept = pruned.log_alpha[0, 0] < math.inf
    assert (state.log_alpha < math.inf).all()
    assert 0 < int(kept.sum()) < 15
    assert pruned.elbo >= state.elbo - 1e-12  # rounding, of 346 nats
    # Those that go had all but gone.
    assert state.loc[0, 0, ~kept].abs().max() < 1e-3 * state.loc[0, 0, kept].abs().min()
