"""MacKay's and EM updates: where they go, and what they delete."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayes_svdo.inference.rvm_basis import DesignMatrix, resolve_kernel
from bayes_svdo.inference.rvm_evidence import (
    Moments,
    NoiseRange,
    derivatives,
    unit_free,
    weight_posterior,
)
from bayes_svdo.inference.rvm_fixed_point import iterate, iterate_logistic, relevant
from bayes_svdo.inference.rvm_laplace import LogisticSearch, as_regression

LEARNED = NoiseRange(learned=True, log_beta_max=math.log(1e6))
N = 60


def problem(m: int = 10, seed: int = 0) -> Moments:
    """Three relevant of ``m`` correlated basis functions of unit norm."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(m, N)) + 0.5 * rng.normal(size=N)
    phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    y = np.array([6.0, -4.0, 3.0]) @ phi[:3] + 0.3 * rng.normal(size=N)
    y /= y.std()
    return Moments(phi @ phi.T, phi @ y, float(y @ y), N)


def run(data: Moments, update, tol=1e-5, max_iter=20_000, noise=LEARNED):
    start = np.zeros(len(data.moment))
    return iterate(data, start, noise, 1.0, update=update, tol=tol, max_iter=max_iter)


@pytest.mark.parametrize("seed", range(10))
def test_em_raises_the_evidence_with_every_update(seed):
    _, _, trace, converged = run(problem(seed=seed), "em")
    assert converged
    # To rounding: the evidence is a sum of terms of the size of N.
    assert (np.diff(trace) >= -1e-11 * N).all()


@pytest.mark.parametrize("update", ["em", "mackay"])
@pytest.mark.parametrize("seed", range(5))
def test_end_is_stationary_and_keeps_only_the_relevant(seed, update):
    data = problem(seed=seed)
    kept, found, _, converged = run(data, update)
    assert converged
    left = data.select(np.isin(np.arange(10), kept))
    scaled, signal = unit_free(found)
    gradient, _ = derivatives(left, found, scaled, signal)
    # The last rise, below 1e-5, is quadratic in what is left of the gradient.
    assert np.abs(gradient).max() < 2e-2
    assert (signal**2 > scaled.diagonal() * (1 - scaled.diagonal())).all()
    assert set(kept) >= {0, 1, 2}


@pytest.mark.parametrize("seed", range(5))
def test_both_updates_end_at_the_same_evidence(seed):
    _, em, _, _ = run(problem(seed=seed), "em")
    _, mackay, _, _ = run(problem(seed=seed), "mackay")
    # EM converges linearly: what is left to gain is some hundred times its last rise.
    assert em.log_evidence == pytest.approx(mackay.log_evidence, abs=5e-3)


def test_noise_that_is_given_stays():
    fixed = NoiseRange(learned=False, log_beta_max=math.inf)
    for update in ("em", "mackay"):
        _, found, _, _ = run(problem(), update, noise=fixed)
        assert found.log_beta == 1.0


def test_noise_stops_at_its_bound():
    data = problem()
    # Targets in the span of the first three.
    weights = np.array([6.0, -4.0, 3.0]) @ data.gram[:3]
    energy = float(np.array([6.0, -4.0, 3.0]) @ weights[:3])
    exact = Moments(data.gram, weights, energy, N)
    for update in ("em", "mackay"):
        _, found, _, _ = run(exact, update)
        assert found.log_beta == LEARNED.log_beta_max


@pytest.mark.parametrize("seed", range(5))
def test_deletions_by_updates_of_rank_one_are_those_of_refitting(seed):
    """The worst goes first, and what is left is judged by its own posterior."""
    data = problem(m=12, seed=seed)
    posterior = weight_posterior(data, np.full(12, 3.0), 0.0)
    fast = relevant(posterior)
    left = np.ones(12, dtype=bool)
    while True:
        part = data.select(left)
        scaled, signal = unit_free(weight_posterior(part, np.full(left.sum(), 3.0), 0.0))
        u = scaled.diagonal()
        gain = np.where(signal**2 <= u * (1 - u), -0.5 * (signal**2 / u + np.log(u)), -np.inf)
        if not np.isfinite(gain).any():
            break
        left[np.flatnonzero(left)[gain.argmax()]] = False
    np.testing.assert_array_equal(fast, left)
    assert 0 < left.sum() < 12


def test_iteration_stops_after_max_iter():
    _, _, trace, converged = run(problem(), "em", max_iter=3)
    assert len(trace) == 3
    assert not converged


def test_a_singular_precision_is_an_error_with_a_remedy():
    twice = Moments(np.ones((2, 2)), np.ones(2), 2.0, N)
    with pytest.raises(ArithmeticError, match=r'2 weights is singular.*\n.*method="fast"'):
        iterate(twice, np.full(2, -60.0), LEARNED, 0.0, update="em", tol=1e-3, max_iter=9)


# The logistic likelihood.


def logistic(seed: int = 0, *, kernel="linear", centred=True, n: int = 120) -> LogisticSearch:
    """Two relevant of six features; the last is constant where ``centred``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, dtype=torch.float64, generator=generator) + 1.0
    odds = 2 * x[:, 0] - 1.5 * x[:, 2] - 1.0
    t = (torch.rand(n, dtype=torch.float64, generator=generator) < odds.sigmoid()).double()
    x[:, 5] = 0.1
    basis = resolve_kernel(x, kernel, 0.3, 3, 1.0)
    return LogisticSearch(DesignMatrix(basis, x, centred=centred, max_bytes=2**30), t)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("update", ["em", "mackay"])
def test_end_under_a_logistic_likelihood_is_a_fixed_point(update, centred, kernel):
    search = logistic(kernel=kernel, centred=centred, n=40)
    mode, trace, converged = iterate_logistic(search, update=update, tol=1e-6, max_iter=20_000)
    assert converged
    assert trace[-1] == mode.log_evidence
    alpha = np.exp(mode.log_alpha)
    variance = mode.covariance.diagonal()
    # The two updates have the same fixed points. The last change, below 1e-6, is quadratic in what
    # is left of the gradient.
    np.testing.assert_allclose(alpha * (mode.mean**2 + variance), 1.0, atol=1e-3)
    np.testing.assert_allclose((1 - alpha * variance) / mode.mean**2, alpha, rtol=2e-3)


@pytest.mark.parametrize("update", ["em", "mackay"])
def test_one_update_is_that_of_tipping(update):
    """From the matrices it is defined by: eq. 16 and 20, posterior of section 3."""
    search = logistic(centred=False)
    before, _, _ = iterate_logistic(search, update=update, tol=1e-9, max_iter=1)
    after, _, _ = iterate_logistic(search, update=update, tol=1e-9, max_iter=2)
    phi, alpha = before.phi.numpy(), np.exp(before.log_alpha)
    p = 1 / (1 + np.exp(-before.mean @ phi))
    variance = np.linalg.inv((phi * p * (1 - p)) @ phi.T + np.diag(alpha)).diagonal()
    new = 1 / (before.mean**2 + variance)
    if update == "mackay":
        new = (1 - alpha * variance) / before.mean**2
    assert after.indices == before.indices == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(np.exp(after.log_alpha), new, rtol=1e-8)
    residual = search.targets.numpy() - 1 / (1 + np.exp(-after.mean @ after.phi.numpy()))
    assert np.abs(after.phi.numpy() @ residual - new * after.mean).max() < 1e-5


@pytest.mark.parametrize("update", ["em", "mackay"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_of_a_logistic_fit_is_relevant_and_found_by_the_search(seed, update):
    search = logistic(seed)
    fast, _, _ = search.run(tol=1e-5, max_iter=1000)
    mode, trace, converged = iterate_logistic(search, update=update, tol=1e-6, max_iter=20_000)
    assert converged
    assert set(mode.indices) == set(fast.indices) >= {0, 2}
    assert 5 not in mode.indices  # the constant
    assert relevant(as_regression(mode)[1]).all()
    # Linear convergence, as above.
    assert mode.log_evidence == pytest.approx(fast.log_evidence, abs=1e-3)
    assert trace[-1] > trace[0]


def test_a_logistic_fit_to_constants_is_empty():
    x = torch.ones(8, 3, dtype=torch.float64)
    design = DesignMatrix(resolve_kernel(x, "linear", 1.0, 3, 1.0), x, centred=True, max_bytes=0)
    search = LogisticSearch(design, torch.tensor([0.0, 1, 1, 1] * 2, dtype=torch.float64))
    mode, trace, converged = iterate_logistic(search, update="em", tol=1e-3, max_iter=9)
    assert converged
    assert len(trace) == 1
    assert mode.indices == []
    assert mode.intercept == pytest.approx(math.log(3))


@pytest.mark.parametrize("update", ["em", "mackay"])
def test_a_logistic_iteration_stops_after_max_iter(update):
    mode, trace, converged = iterate_logistic(
        logistic(kernel="rbf"), update=update, tol=1e-9, max_iter=3
    )
    assert len(trace) == 3
    assert not converged
    assert trace[-1] == mode.log_evidence
