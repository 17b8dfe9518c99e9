"""The evidence of a few basis functions, its derivatives and its maximum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from bayes_svdo.inference.rvm_evidence import (
    Moments,
    NoiseRange,
    deletion_gain,
    derivatives,
    maximise_evidence,
    unit_free,
    weight_posterior,
)

LEARNED = NoiseRange(learned=True, log_beta_max=math.log(1e6))
N = 30


def problem(m: int = 5, seed: int = 0, signal: float = 3.0):
    """Basis functions of unit norm (rows), targets of unit variance, and their moments."""
    rng = np.random.default_rng(seed)
    phi = rng.normal(size=(m, N))
    phi[-1] += phi[0]  # correlated, so that the posterior is not diagonal
    phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    y = signal * phi[0] + rng.normal(size=N)
    y /= y.std()
    return phi, y, Moments(gram=phi @ phi.T, moment=phi @ y, energy=float(y @ y), num_data=N)


def log_density(phi, y, log_alpha, log_beta):
    covariance = np.eye(N) / math.exp(log_beta) + (phi.T / np.exp(log_alpha)) @ phi
    return multivariate_normal.logpdf(y, cov=covariance)


@pytest.mark.parametrize("seed", range(5))
def test_log_evidence_is_the_log_density_of_the_targets(seed):
    phi, y, data = problem(seed=seed)
    log_alpha, log_beta = np.random.default_rng(seed).normal(size=5), 0.3
    found = weight_posterior(data, log_alpha, log_beta).log_evidence
    expected = log_density(phi, y, log_alpha, log_beta) + N / 2 * math.log(2 * math.pi)
    assert found == pytest.approx(expected, abs=1e-10)


def test_posterior_is_that_of_the_conjugate_model():
    phi, y, data = problem()
    log_alpha, beta = np.linspace(-1, 1, 5), 2.0
    found = weight_posterior(data, log_alpha, math.log(beta))
    covariance = np.linalg.inv(beta * phi @ phi.T + np.diag(np.exp(log_alpha)))
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-10)
    np.testing.assert_allclose(found.mean, beta * covariance @ phi @ y, rtol=1e-10)
    assert found.residual == pytest.approx(((y - found.mean @ phi) ** 2).sum(), rel=1e-10)
    np.testing.assert_allclose(found.whitener.T @ found.whitener, covariance, rtol=1e-10)


def test_no_basis_functions_leave_pure_noise():
    _, y, data = problem()
    nothing = Moments(np.empty((0, 0)), np.empty(0), data.energy, N)
    found = weight_posterior(nothing, np.empty(0), 0.4)
    expected = multivariate_normal.logpdf(y, cov=math.exp(-0.4) * np.eye(N))
    assert found.log_evidence == pytest.approx(expected + N / 2 * math.log(2 * math.pi))


@pytest.mark.parametrize("seed", range(3))
def test_derivatives_are_those_of_the_density(seed):
    """Against automatic differentiation of the density of the targets, which knows no weights."""
    phi, y, data = problem(seed=seed)
    at = np.append(np.random.default_rng(seed).normal(size=5), 0.3)
    rows, targets = torch.from_numpy(phi), torch.from_numpy(y)

    def density(point):
        covariance = (
            torch.eye(N).double() * (-point[5]).exp() + (rows.T * (-point[:5]).exp()) @ rows
        )
        return torch.distributions.MultivariateNormal(targets * 0, covariance).log_prob(targets)

    posterior = weight_posterior(data, at[:5], float(at[5]))
    gradient, curvature = derivatives(data, posterior, *unit_free(posterior))
    point = torch.from_numpy(at)
    expected = torch.autograd.functional.jacobian(density, point)
    np.testing.assert_allclose(gradient, expected.numpy(), atol=1e-10)
    expected = torch.autograd.functional.hessian(density, point)
    np.testing.assert_allclose(curvature, expected.numpy(), atol=1e-10)


def test_deletion_gain_is_the_difference_of_evidence():
    phi, y, data = problem()
    log_alpha = np.linspace(-1, 1, 5)
    posterior = weight_posterior(data, log_alpha, 0.3)
    scaled, signal = unit_free(posterior)
    gains = deletion_gain(scaled.diagonal(), signal**2)
    for i in range(5):
        left = np.arange(5) != i
        without = log_density(phi[left], y, log_alpha[left], 0.3)
        assert gains[i] == pytest.approx(without - log_density(phi, y, log_alpha, 0.3), abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_a_basis_function_is_relevant_iff_a_finite_precision_is_best(seed):
    """The closed rule against the evidence over a grid of its precision, the others held."""
    _, _, data = problem(seed=seed, signal=1.0)
    posterior = weight_posterior(data, np.zeros(5), 0.0)
    scaled, signal = unit_free(posterior)
    u = scaled.diagonal()
    for i in range(5):
        grid = np.linspace(-6, 16, 400)
        at = [np.where(np.arange(5) == i, value, 0.0) for value in grid]
        best = int(np.argmax([weight_posterior(data, a, 0.0).log_evidence for a in at]))
        assert (signal[i] ** 2 > u[i] * (1 - u[i])) == (best < 399)


@pytest.mark.parametrize("seed", range(10))
def test_maximum_is_stationary_and_keeps_only_the_relevant(seed):
    _, _, data = problem(m=8, seed=seed)
    start = weight_posterior(data, np.zeros(8), 0.0)
    kept, found = maximise_evidence(data, start, LEARNED, tol=1e-12, max_steps=200)
    left = data.select(np.isin(np.arange(8), kept))
    gradient, curvature = derivatives(left, found, *unit_free(found))
    assert np.abs(gradient).max() < 1e-6
    assert np.linalg.eigvalsh(curvature).max() < 0  # a maximum, not a saddle
    assert found.log_evidence > start.log_evidence
    scaled, signal = unit_free(found)
    assert (signal**2 > scaled.diagonal() * (1 - scaled.diagonal())).all()


@pytest.mark.parametrize("seed", range(10))
def test_every_step_raises_the_evidence(seed):
    _, _, data = problem(m=8, seed=seed)
    rng = np.random.default_rng(seed)
    posterior = weight_posterior(data, 4 * rng.normal(size=8), 3 * rng.normal())
    for _ in range(30):
        kept, new = maximise_evidence(data, posterior, LEARNED, tol=1e-12, max_steps=1)
        assert new.log_evidence >= posterior.log_evidence
        data, posterior = data.select(np.isin(np.arange(len(posterior.mean)), kept)), new


def test_noise_that_is_given_stays():
    _, _, data = problem()
    fixed = NoiseRange(learned=False, log_beta_max=math.inf)
    start = weight_posterior(data, np.zeros(5), 0.7)
    _, found = maximise_evidence(data, start, fixed, tol=1e-12, max_steps=100)
    assert found.log_beta == 0.7
    assert found.log_evidence > start.log_evidence


def test_noise_stops_at_its_bound_and_the_precisions_go_on():
    """Targets in the span of the basis functions: without a bound the noise would vanish."""
    phi, _, data = problem()
    y = phi[0] * math.sqrt(N)
    exact = Moments(data.gram, phi @ y, float(y @ y), N)
    start = weight_posterior(exact, np.zeros(5), 0.0)
    kept, found = maximise_evidence(exact, start, LEARNED, tol=1e-12, max_steps=200)
    assert found.log_beta == LEARNED.log_beta_max
    assert kept.tolist() == [0]
    gradient, _ = derivatives(exact.select(np.arange(5) == 0), found, *unit_free(found))
    assert abs(gradient[0]) < 1e-6


def test_irrelevant_basis_functions_leave_noise_alone():
    """When all are deleted the noise is the variance of the targets."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=N)
    phi = rng.normal(size=(1, N))
    phi -= (phi @ y)[:, None] * y / (y @ y)  # says nothing about the targets
    phi /= np.linalg.norm(phi)
    data = Moments(phi @ phi.T, phi @ y, float(y @ y), N)
    start = weight_posterior(data, np.zeros(1), 2.0)
    kept, found = maximise_evidence(data, start, LEARNED, tol=1e-9, max_steps=50)
    assert len(kept) == 0
    assert found.log_beta == pytest.approx(-math.log(y @ y / N))


def test_a_singular_precision_is_reported_not_returned():
    twice = Moments(np.ones((2, 2)), np.ones(2), 2.0, N)
    assert weight_posterior(twice, np.full(2, -60.0), 0.0) is None


def test_evidence_that_rounding_decides_is_reported_not_returned():
    """Two all but equal functions with opposite weights of 1e9 for a signal in their difference.

    The factorisation succeeds, yet the squares of such weights times the rounding of the Gram
    matrix exceed the energy of the targets.
    """
    close = 1 - 1e-15
    gram = np.array([[1.0, close], [close, 1.0]])
    data = Moments(gram, np.array([1e-7, -1e-7]), 1.0, N)
    assert np.isfinite(np.linalg.cholesky(gram + 1e-16 * np.eye(2))).all()
    assert weight_posterior(data, np.full(2, math.log(1e-16) + 9.2), 9.2) is None
