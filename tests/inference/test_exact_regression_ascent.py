"""The steps of the ascent, one by one: what each promises is what the ELBO does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures

from bayes_svdo.inference import exact_regression_ascent as ascent
from bayes_svdo.inference.exact_regression import fit_vdard_regression
from bayes_svdo.inference.exact_regression_arrays import TorchArrays
from bayes_svdo.inference.exact_regression_data import natural_units, problems_of

pytestmark = pytest.mark.usefixtures("torch_arrays")

STARTS = ("zero", "ols", "ridge")
NOTHING = torch.tensor(math.inf, dtype=torch.float64)


def in_natural_units(x, y, kl_weight=1.0):
    return problems_of(
        natural_units(x[None], y[None], True), len(y) - 1, kl_weight, None, 0.0, "exact"
    )


def start_from_zero(problems):
    return ascent.start(problems, ("zero",))


def unfinished(state):
    return torch.zeros_like(state.elbo, dtype=torch.bool)


def test_every_single_move_gains_at_least_what_it_promises(problem) -> None:
    x, y = problem(num=60, dim=30, correlation=0.9)
    problems = in_natural_units(x, y)
    state = ascent.start(problems, ("zero", "ols", "ridge"))
    for _ in range(6):
        moves = ascent.find_moves(problems, state)
        for d in range(30):
            log_alpha = state.log_alpha.clone()
            log_alpha[..., d] = moves.refitted[..., d]
            rise = ascent.evaluate(problems, log_alpha).elbo - state.elbo
            assert (rise >= moves.gain[..., d] - 1e-10).all()
        state = ascent.evaluate(problems, ascent.single_move(problems, state, moves))


def test_a_pruned_weight_comes_back(problem) -> None:
    """From the full model to the optimum, 0 is no trap: some weight leaves and returns."""
    returned = 0
    for seed in range(8):
        x, y = problem(num=60, dim=40, seed=seed, correlation=0.95)
        problems = in_natural_units(x, y)
        state = ascent.start(problems, ("ridge",))
        finished = unfinished(state)
        left = torch.zeros(40, dtype=torch.bool)
        for _ in range(30):
            before = state.log_alpha[0, 0].isfinite()
            state, finished = ascent.iterate(problems, state, finished, 1e-8)
            after = state.log_alpha[0, 0].isfinite()
            returned += int((left & after & ~before).sum())
            left |= before & ~after
    assert returned > 0


def test_a_step_that_is_cut_short_leaves_no_trace_of_those_that_would_enter() -> None:
    """All products of two features of diabetes: many correlated, so that steps are refused."""
    features, target = load_diabetes(return_X_y=True, scaled=False)
    for seed in range(6):
        rows = np.random.default_rng(seed).permutation(len(target))[:300]
        x = (features[rows] - features[rows].mean(0)) / features[rows].std(0)
        x = PolynomialFeatures(2, include_bias=False).fit_transform(x)
        fit = fit_vdard_regression(torch.from_numpy(x), torch.from_numpy(target[rows]))
        assert not fit.log_alpha.isnan().any()
        assert fit.elbo == fit.start_elbo.max()
        assert float(fit.elbo) == pytest.approx(float(fit.elbo_trace[-1]), abs=1e-6)


@pytest.mark.parametrize(("num", "dim"), [(60, 20), (30, 50)])  # with a Gram matrix, and without
def test_a_state_is_the_ridge_regression_of_its_alphas(num, dim, problem) -> None:
    problems = in_natural_units(*problem(num=num, dim=dim), kl_weight=2.0)
    generator = torch.Generator().manual_seed(0)
    log_alpha = torch.randn(1, 3, dim, generator=generator, dtype=torch.float64)
    for start, kept in enumerate((0, 4, 9)):  # as many slots for all as the largest needs
        log_alpha[0, start, kept:] = math.inf
    state = ascent.evaluate(problems, log_alpha)
    x, t = problems.x_rows[0].T, problems.target[0]
    for start, kept in enumerate((0, 4, 9)):
        active, alpha = x[:, :kept], log_alpha[0, start, :kept].exp()
        loc = torch.linalg.solve(active.T @ active + alpha.diag(), active.T @ t)
        error = (t - active @ loc).square().sum() + (alpha * loc.square()).sum()
        beta = (num - 1) / error
        elbo = 0.5 * (num - 1) * (torch.log(beta / (2 * math.pi)) - 1)
        elbo = elbo - 2.0 * problems.curves.kl(log_alpha[0, start, :kept]).sum()
        assert torch.allclose(state.loc[0, start, :kept], loc, atol=1e-12)
        assert (state.loc[0, start, kept:] == 0).all()
        assert torch.allclose(state.noise_precision[0, start], beta)
        assert torch.allclose(state.elbo[0, start], elbo)
        assert torch.allclose(state.residual[0, start], t - active @ loc, atol=1e-12)


def test_starts_are_what_their_names_say(problem) -> None:
    problems = in_natural_units(*problem())
    state = ascent.start(problems, STARTS)
    zero, ols, ridge = state.log_alpha[0]
    assert (ridge == 0).all()
    z2 = 79 * problems.moment[0].square()  # where there are no other weights, and |target| = 1
    entered = zero < math.inf
    assert 1 <= int(entered.sum()) <= 8
    assert entered[z2.argmax()]
    assert torch.allclose(zero[entered], problems.curves.optimal_log_alpha(z2 - 1)[entered])
    x, t = problems.x_rows[0].T, problems.target[0]
    loc = torch.linalg.lstsq(x, t[:, None]).solution[:, 0]
    z2 = (79 - 12) * loc.square() / (t - x @ loc).square().sum()
    assert torch.equal(ols == math.inf, z2 <= 1)
    assert torch.allclose(ols, problems.curves.optimal_log_alpha(z2 - 1), atol=1e-5)


def test_weights_that_would_only_gain_one_by_one_do_not_start_together() -> None:
    """Eight columns, each with z² = 3, that all but share what they explain."""
    gram = torch.full((8, 8), 0.29, dtype=torch.float64).fill_diagonal_(1.0)
    moment = torch.full((8, 1), math.sqrt(3 / 200), dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 9, generator=generator, dtype=torch.float64))[0]
    root = torch.linalg.cholesky(gram)
    explained = torch.linalg.solve_triangular(root, moment, upper=False)
    y = basis @ torch.cat((explained, (1 - explained.square().sum()).sqrt().view(1, 1)))
    x = basis[:, :8] @ root.T
    data = natural_units(x[None], y[None, :, 0], False)
    problems = problems_of(data, 200, 1.0, None, 0.0, "exact")
    nothing, state = ascent.evaluate(problems, NOTHING.expand(1, 1, 8)), start_from_zero(problems)
    together = problems.curves.optimal_log_alpha(torch.full((1, 1, 8), 2.0, dtype=torch.float64))
    one = together.clone()
    one[..., 1:] = math.inf
    assert ascent.evaluate(problems, together).elbo < nothing.elbo
    assert ascent.evaluate(problems, one).elbo > nothing.elbo
    assert (state.log_alpha == math.inf).all()
    assert torch.allclose(state.elbo, nothing.elbo)


def test_a_newton_step_squares_the_distance(problem) -> None:
    problems = in_natural_units(*problem(num=200, dim=6, noise=0.2), kl_weight=0.5)
    state = ascent.start(problems, ("ols",))
    finished = unfinished(state)
    for _ in range(20):
        state, finished = ascent.iterate(problems, state, finished, 1e-14)
    top = state.log_alpha
    kept = top < math.inf
    distances = []
    state = ascent.evaluate(problems, torch.where(kept, top + 0.3, top))
    for _ in range(3):
        moved, _ = ascent.newton_step(problems, state, ascent.find_moves(problems, state))
        state = ascent.evaluate(problems, state.log_alpha.scatter(-1, state.active, moved))
        distances.append(float((state.log_alpha - top)[kept].abs().max()))
    assert distances[0] < 0.1
    assert distances[1] < distances[0] ** 2
    assert distances[2] < 1e-5


def test_those_that_enter_together_are_little_correlated(problem) -> None:
    problems = in_natural_units(*problem(num=400, dim=60, correlation=0.7))
    state = ascent.evaluate(problems, NOTHING.expand(1, 1, 60))
    moves = ascent.find_moves(problems, state)
    entered = ascent.change_set(problems, state, moves, state.log_alpha, 1e-6) < math.inf
    columns = problems.x_rows[0, entered[0, 0]]
    assert 2 <= len(columns) <= 8
    assert (moves.gain > 1e-6).sum() > len(columns)
    assert (columns @ columns.T).fill_diagonal_(0.0).abs().max() <= 0.3
    assert entered[0, 0, moves.gain[0, 0].argmax()]
    assert torch.equal(start_from_zero(problems).log_alpha < math.inf, entered)


def test_only_starts_on_the_way_to_the_same_maximum_join(problem) -> None:
    problems = in_natural_units(*problem())
    top = ascent.start(problems, ("ols",)).log_alpha
    share = torch.sigmoid(-top)

    def shrunk(change):
        other = (share - change * (share > 0.5)).clamp(0, 1)
        return torch.cat((top, torch.logit(1 - other).masked_fill(top == math.inf, math.inf)), 1)

    near, far = (ascent.evaluate(problems, shrunk(change)) for change in (0.1, 0.2))
    joined, finished = ascent.join(TorchArrays, near, torch.tensor([[True, False]]))
    best = int(near.elbo.argmax())
    assert joined.elbo.shape == (1, 1)
    assert joined.elbo == near.elbo.max()
    assert torch.equal(joined.log_alpha[:, 0], near.log_alpha[:, best])
    assert bool(finished) is (best == 0)
    apart, _ = ascent.join(TorchArrays, far, torch.tensor([[True, False]]))
    assert torch.equal(apart.elbo, far.elbo)
    both = ascent.evaluate(
        problems.take(torch.tensor([0, 0])), torch.cat((shrunk(0.1), shrunk(0.2)))
    )
    neither, _ = ascent.join(TorchArrays, both, torch.zeros(2, 2, dtype=torch.bool))
    assert neither.elbo.shape == (2, 2)


def test_the_finished_stay_where_they_are(problem) -> None:
    problems = in_natural_units(*problem())
    state = ascent.start(problems, STARTS)
    new, finished = ascent.iterate(problems, state, torch.tensor([[False, True, False]]), 1e-9)
    assert finished.tolist() == [[False, True, False]]
    assert torch.equal(new.log_alpha[:, 1], state.log_alpha[:, 1])
    assert (new.elbo > state.elbo).tolist() == [[True, False, True]]


def test_a_known_noise_is_kept_and_a_bound_holds(problem) -> None:
    data = natural_units(*(v[None] for v in problem()), True)
    given = problems_of(data, 79, 1.0, torch.tensor([[3.0]], dtype=torch.float64), 0.0, "exact")
    bounded = problems_of(data, 79, 1.0, None, 0.9, "exact")
    error = torch.tensor([[0.5, 1e-9]], dtype=torch.float64)
    assert (ascent.best_noise_precision(given, error) == 3.0).all()
    expected = torch.tensor([[79 / 0.81, 79 / 0.81]]).double()
    assert torch.allclose(ascent.best_noise_precision(bounded, error), expected)


def test_after_the_last_newton_step_nothing_is_left_for_another(problem) -> None:
    rested = 0
    for seed in range(12):
        problems = in_natural_units(*problem(num=120, dim=40, seed=seed, correlation=0.5))
        state = ascent.start(problems, ("ols",))
        finished = unfinished(state)
        while not (finished | state.at_rest).all():
            state, finished = ascent.iterate(problems, state, finished, 1e-7)
        if state.at_rest.all() and not finished.all():
            rested += 1
            moved, gain = ascent.newton_step(problems, state, ascent.find_moves(problems, state))
            after = ascent.evaluate(problems, state.log_alpha.scatter(-1, state.active, moved))
            assert abs(float(after.elbo - state.elbo)) < 1e-10
            assert 0 <= gain < 1e-10
            same, finished = ascent.iterate(problems, state, finished, 1e-7)
            assert same is state
            assert finished.all()
    assert rested > 3
