"""The search for basis functions: what it promises, what it keeps, what it costs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayes_svdo.inference import rvm_search
from bayes_svdo.inference.rvm_basis import DesignMatrix, resolve_kernel
from bayes_svdo.inference.rvm_evidence import NoiseRange, derivatives, unit_free, weight_posterior
from bayes_svdo.inference.rvm_search import ActiveSet, best_candidate, search

LEARNED = NoiseRange(learned=True, log_beta_max=math.log(1e6))
OPTIMISTIC = math.log(1000.0)


def active_set(n: int = 120, seed: int = 0, kernel="rbf", gamma=0.5, noise=0.1, d=1) -> ActiveSet:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, d, dtype=torch.float64, generator=generator) * 20 - 10
    y = torch.sinc(x[:, 0] / torch.pi)
    y = y + noise * torch.randn(n, dtype=torch.float64, generator=generator)
    y = y - y.mean()
    basis = resolve_kernel(x, kernel, gamma, 3, 1.0)
    design = DesignMatrix(basis, x, centred=True, max_bytes=2**30)
    return ActiveSet(design, y / y.std(correction=0), n - 1)


def evidence_with(active: ActiveSet, index: int, posterior, log_alpha: float) -> float:
    active.indices.append(index)
    found = weight_posterior(
        active.moments(), np.append(posterior.log_alpha, log_alpha), posterior.log_beta
    )
    active.indices.pop()
    return found.log_evidence


def grown(active: ActiveSet, most: int):
    """Posterior after adding, from the empty model."""
    empty = weight_posterior(active.moments(), np.empty(0), 2.0)
    new = active.add_best(empty, most, 1e-3)
    return weight_posterior(active.moments(), np.array(new), 2.0)


def test_the_candidate_chosen_is_the_best_of_all():
    """Every candidate added in turn, at its best precision found on a grid."""
    active = active_set(n=40)
    posterior = grown(active, 2)
    before = list(active.indices)
    (log_alpha,) = active.add_best(posterior, 1, 1e-3)
    chosen = active.indices.pop()
    best = evidence_with(active, chosen, posterior, log_alpha)
    for index in set(range(40)) - set(before):
        grid = [evidence_with(active, index, posterior, a) for a in np.linspace(-10, 10, 41)]
        assert max(grid) <= best + 1e-9


def test_those_added_together_enter_at_their_best_precision_given_those_before():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, dtype=torch.float64, generator=generator)
    x[:, 1:] += 0.3 * x[:, :-1]  # correlated: each changes what the next is worth
    y = x @ torch.tensor([3.0, 0.1, -3.0, 0.1, 2.0, 0.1], dtype=torch.float64)
    y = y - y.mean()
    design = DesignMatrix(resolve_kernel(x, "linear", 1.0, 3, 1.0), x, centred=True, max_bytes=0)
    active = ActiveSet(design, y / y.std(correction=0), 59)
    empty = weight_posterior(active.moments(), np.empty(0), 2.0)
    log_alphas = active.add_best(empty, 3, 1e-3)
    assert len(log_alphas) == 3
    indices = list(active.indices)
    for count in range(1, 4):
        active.indices = indices[:count]
        posterior = weight_posterior(active.moments(), np.array(log_alphas[:count]), 2.0)
        gradient, _ = derivatives(active.moments(), posterior, *unit_free(posterior))
        assert abs(gradient[count - 1]) < 1e-8


def test_gain_is_the_rise_in_evidence():
    active = active_set()
    posterior = grown(active, 3)
    rows = torch.as_tensor(active._rows(active.indices))
    beta = math.exp(posterior.log_beta)
    spanned = torch.from_numpy(beta * posterior.whitener) @ rows
    s = beta - spanned.square().sum(0)
    q = beta * (active.moment - torch.from_numpy(posterior.mean) @ rows)
    index, gain = best_candidate(s, q, least=0.0, barred=active.indices)
    (log_alpha,) = active.add_best(posterior, 1, 1e-3)
    assert active.indices.pop() == index
    rise = evidence_with(active, index, posterior, log_alpha) - posterior.log_evidence
    assert gain == pytest.approx(rise, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_evidence_rises_in_every_round(seed):
    _, trace, converged = search(active_set(seed=seed), LEARNED, OPTIMISTIC, tol=1e-3, max_iter=500)
    assert converged
    assert (np.diff(trace) >= 0).all()


def test_end_is_a_maximum_over_every_single_basis_function():
    """In use: stationary. Outside: none would raise the evidence by more than the tolerance."""
    active = active_set()
    posterior, _, _ = search(active, LEARNED, OPTIMISTIC, tol=1e-3, max_iter=500)
    gradient, curvature = derivatives(active.moments(), posterior, *unit_free(posterior))
    assert np.abs(gradient).max() < 1e-4
    assert np.linalg.eigvalsh(curvature).max() < 0
    for index in set(range(120)) - set(active.indices):
        for log_alpha in np.linspace(-8, 12, 21):
            rise = evidence_with(active, index, posterior, log_alpha) - posterior.log_evidence
            assert rise < 1e-3


def test_an_exchange_gains_what_it_promises():
    active = active_set()
    posterior, _, _ = search(active, LEARNED, OPTIMISTIC, tol=1.0, max_iter=500)
    best = active.best_exchange(posterior)
    before = list(active.indices)
    rises = []
    for leaves in range(len(before)):
        for enters in set(range(120)) - set(before):
            active.indices = before[:leaves] + before[leaves + 1 :]
            shorter = weight_posterior(
                active.moments(), np.delete(posterior.log_alpha, leaves), posterior.log_beta
            )
            rises += [
                (evidence_with(active, enters, shorter, log_alpha), leaves, enters)
                for log_alpha in np.linspace(-8, 12, 41)
            ]
    highest, leaves, enters = max(rises)
    assert (best.leaves, best.enters) == (leaves, enters)
    gap = posterior.log_evidence + best.gain - highest
    assert -1e-8 < gap < 0.05  # the grid's step is 0.5 in log_alpha


def test_the_search_ends_where_no_exchange_is_worth_it():
    active = active_set(n=300, noise=0.3)
    posterior, _, converged = search(active, LEARNED, OPTIMISTIC, tol=1e-3, max_iter=500)
    assert converged
    assert active.best_exchange(posterior).gain < 1e-2


def test_only_basis_functions_that_entered_cost_a_pass_over_the_data():
    active = active_set(n=400)
    search(active, LEARNED, OPTIMISTIC, tol=1e-3, max_iter=500)
    assert len(active.indices) <= len(active._slots) < 400 / 5


def test_an_optimistic_start_escapes_taking_all_for_noise():
    """Half a period of a wide kernel: no single basis function pays its way under full noise."""
    hopeful, modest = active_set(gamma=0.01), active_set(gamma=0.01)
    best, _, _ = search(hopeful, LEARNED, OPTIMISTIC, tol=1e-3, max_iter=500)
    worst, _, _ = search(modest, LEARNED, 0.0, tol=1e-3, max_iter=500)
    assert best.log_evidence > worst.log_evidence + 10


def test_search_stops_after_max_iter_rounds():
    _, trace, converged = search(active_set(), LEARNED, OPTIMISTIC, tol=1e-3, max_iter=3)
    assert len(trace) == 3
    assert not converged


def test_a_promise_that_is_not_kept_is_withdrawn(monkeypatch):
    """Where rounding makes every gain up, the search ends with what it had, and ends."""
    active = active_set()
    tried = []

    def promises(self, posterior, most, tol):
        index = next(i for i in range(120) if i not in self.indices + self._barred)
        tried.append(index)
        self.indices.append(index)
        return [30.0]  # a precision so high that the basis function changes nothing

    monkeypatch.setattr(ActiveSet, "add_best", promises)
    _, trace, converged = search(active, LEARNED, 0.0, tol=1e-3, max_iter=500)
    assert converged
    assert active.indices == []
    assert tried == 2 * list(range(rvm_search.MOST_BROKEN_PROMISES))
    assert len(trace) == 1


def test_aligned_candidates_do_not_enter_together():
    """Each feature three times over: one of each is enough."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    y = x.sum(1) + 0.1 * torch.randn(50, dtype=torch.float64, generator=generator)
    y = y - y.mean()
    x = torch.cat([x, 2 * x, 3 - x], 1)
    design = DesignMatrix(resolve_kernel(x, "linear", 1.0, 3, 1.0), x, centred=True, max_bytes=0)
    active = ActiveSet(design, y / y.std(correction=0), 49)
    search(active, LEARNED, OPTIMISTIC, tol=1e-3, max_iter=100)
    assert sorted(i % 4 for i in active.indices) == [0, 1, 2, 3]


@pytest.mark.parametrize(("d", "kernel"), [(1, "rbf"), (40, "linear")])
def test_tensors_and_arrays_take_the_same_path(d, kernel, monkeypatch):
    """Arrays on the CPU, tensors on any other device: here tensors on the CPU stand for those."""
    arrays = active_set(n=300, d=d, kernel=kernel)
    _, trace, _ = search(arrays, LEARNED, OPTIMISTIC, tol=1e-3, max_iter=500)
    monkeypatch.setattr(rvm_search, "_light", lambda values: values)
    tensors = active_set(n=300, d=d, kernel=kernel)
    _, same, _ = search(tensors, LEARNED, OPTIMISTIC, tol=1e-3, max_iter=500)
    assert isinstance(tensors._products, torch.Tensor)
    assert tensors.indices == arrays.indices
    np.testing.assert_allclose(same, trace, rtol=1e-9)
