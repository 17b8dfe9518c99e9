"""Laplace's approximation for a logistic likelihood, and the search under it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import dblquad
from scipy.special import expit
from sklearn.datasets import load_digits

from bayes_svdo.inference.rvm_basis import DesignMatrix, resolve_kernel
from bayes_svdo.inference.rvm_laplace import LogisticSearch


def make_search(n: int = 80, d: int = 6, seed: int = 0, *, centred=True, kernel="linear"):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator) + 1.0
    odds = 2 * x[:, 0] - 1.5 * x[:, 2] - 1.0
    t = (torch.rand(n, dtype=torch.float64, generator=generator) < odds.sigmoid()).double()
    basis = resolve_kernel(x, kernel, 0.3, 3, 1.0)
    return LogisticSearch(DesignMatrix(basis, x, centred=centred, max_bytes=2**30), t)


def mode_at(search: LogisticSearch, indices: list[int], log_alpha):
    m = len(indices)
    rows = search.design.rows(torch.tensor(indices))
    return search.mode(indices, rows, np.asarray(log_alpha, dtype=float), np.zeros(m), 0.0)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_mode_is_where_the_log_posterior_is_flat(seed, centred):
    search = make_search(seed=seed, centred=centred)
    found = mode_at(search, [0, 2, 3], [-3.0, -2.0, 0.0])
    phi, t = found.phi.numpy(), search.targets.numpy()
    residual = t - expit(found.mean @ phi + found.intercept)
    slope = phi @ residual - np.exp(found.log_alpha) * found.mean
    # The mode is exact to 1e-10 nats, which is quadratic in the slope.
    assert np.abs(slope).max() < 1e-5
    if centred:
        assert abs(residual.sum()) < 1e-5
    else:
        assert found.intercept == 0


@pytest.mark.parametrize("centred", [True, False])
def test_log_evidence_is_that_of_laplace(centred):
    """Written out over weights and intercept together, the intercept's prior density being 1."""
    search = make_search(centred=centred)
    found = mode_at(search, [0, 2, 3], [-3.0, -2.0, 0.0])
    phi, t = found.phi.numpy(), search.targets.numpy()
    alpha, extra = np.exp(found.log_alpha), [1.0] if centred else []
    phi = np.concatenate([phi, np.ones((len(extra), len(t)))])
    at = np.concatenate([found.mean, [found.intercept] * len(extra)])
    p = expit(at @ phi)
    hessian = (phi * (p * (1 - p))) @ phi.T + np.diag(np.concatenate([alpha, 0 * np.array(extra)]))
    expected = np.log(np.where(t == 1, p, 1 - p)).sum() - 0.5 * alpha @ found.mean**2
    expected += 0.5 * (np.log(alpha).sum() - len(alpha) * math.log(2 * math.pi))
    expected += 0.5 * (len(at) * math.log(2 * math.pi) - np.linalg.slogdet(hessian)[1])
    assert found.log_evidence == pytest.approx(expected, abs=1e-9)
    np.testing.assert_allclose(found.covariance, np.linalg.inv(hessian)[:3, :3], rtol=1e-8)


def test_laplace_is_close_to_the_integral():
    """One weight and the intercept, integrated numerically; Laplace is off by O(1/n)."""
    search = make_search(n=200)
    found = mode_at(search, [0], [-4.0])
    phi, t, alpha = found.phi.numpy()[0], search.targets.numpy(), math.exp(-4.0)

    def density(w, b):
        height = -np.logaddexp(0, -(2 * t - 1) * (w * phi + b)).sum() - 0.5 * alpha * w**2
        return math.exp(height - found.log_evidence)

    reach = 8 * math.sqrt(found.covariance[0, 0])
    b, wide = found.intercept, 8 / math.sqrt(found.at.total)
    low, high = found.mean[0] - reach, found.mean[0] + reach
    integral, _ = dblquad(density, b - wide, b + wide, low, high, epsabs=1e-4)
    exact = math.log(integral * math.sqrt(alpha / (2 * math.pi)))
    assert abs(exact) < 0.03


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("centred", [True, False])
def test_candidates_are_judged_by_their_sparsity_and_quality(kernel, centred):
    """Tipping and Faul (2003), eq. 19 and 22-24, from the matrices they are defined by."""
    search = make_search(kernel=kernel, centred=centred)
    mode = mode_at(search, [0, 2], [-3.0, -2.0])
    everything = search.design.rows(torch.arange(search.design.num_basis)).numpy()
    p = expit(mode.mean @ mode.phi.numpy() + mode.intercept)
    b = p * (1 - p)
    phi, prior = mode.phi.numpy(), np.exp(mode.log_alpha)
    if centred:
        phi, prior = np.concatenate([phi, np.ones((1, len(b)))]), np.append(prior, 0.0)
    inner = np.linalg.inv((phi * b) @ phi.T + np.diag(prior))
    cross = (everything * b) @ phi.T
    s = (everything**2) @ b - np.einsum("ij,jk,ik->i", cross, inner, cross)
    q = everything @ (search.targets.numpy() - p)
    outside = np.setdiff1d(np.arange(len(s)), mode.indices)
    ratio = q[outside] ** 2 / s[outside]
    gain = np.where(ratio > 1, 0.5 * (ratio - 1 - np.log(ratio)), 0)
    best = outside[gain.argmax()]
    index, log_alpha = search._candidate(mode, [], 1e-3)
    assert index == best
    assert log_alpha == pytest.approx(math.log(s[best] ** 2 / (q[best] ** 2 - s[best])), rel=1e-8)
    assert search._candidate(mode, [], float(gain.max()) + 1e-6) is None
    other = search._candidate(mode, [int(best)], 1e-9)
    assert (other is None) == (np.sort(gain)[-2] == 0)
    assert other is None or other[0] == outside[gain.argsort()[-2]]


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("seed", range(3))
def test_end_is_the_fixed_point_of_the_re_estimation_equations(seed, kernel):
    search = make_search(n=150, seed=seed, kernel=kernel)
    mode, trace, converged = search.run(tol=1e-3, max_iter=200)
    assert converged
    assert len(trace) < 200
    alpha = np.exp(mode.log_alpha)
    determined = 1 - alpha * mode.covariance.diagonal()
    np.testing.assert_allclose(alpha * mode.mean**2, determined, atol=1e-4)
    candidate = search._candidate(mode, [], 1e-3)
    if candidate is not None:  # then it does not keep its promise
        with_it = search._reestimate(search._with(mode, *candidate), 0.1)
        assert with_it.log_evidence <= mode.log_evidence


def test_evidence_rises_until_the_last_re_estimation():
    search = make_search(n=150, kernel="rbf")
    _, trace, _ = search.run(tol=1e-3, max_iter=200)
    rises = np.diff(trace)
    assert (rises[:-1] >= 0).all()
    assert rises[-1] > -0.01  # the fixed point is not quite the maximum of the approximation


def test_confident_points_do_not_make_up_evidence():
    """Where p rounds to 1 the residual must be its tail: 1 - p is 0 or 1e-16 there by chance."""
    search = make_search()
    found = mode_at(search, [0], [0.0])
    far = search._expansion(found.phi, np.array([400.0]), 0.0)
    latent = 400.0 * found.phi.numpy()[0]
    t = search.targets.numpy()
    expected = np.where(t == 1, expit(-latent), -expit(latent))
    np.testing.assert_allclose(far.residual.numpy(), expected, rtol=1e-12)
    assert (far.precision > 0).all()


def test_search_stops_after_max_iter_rounds():
    _, trace, converged = make_search(kernel="rbf").run(tol=1e-3, max_iter=1)
    assert len(trace) == 1
    assert not converged


def test_the_search_does_not_go_round_in_circles():
    """Nines of these digits: what enters raises the evidence, and re-estimation lowers it again."""
    images, labels = load_digits(return_X_y=True)
    half = np.random.default_rng(4).permutation(len(labels))[:898]
    x = torch.from_numpy(images[half] / 16.0)
    design = DesignMatrix(resolve_kernel(x, "linear", 1.0, 3, 1.0), x, centred=True, max_bytes=0)
    search = LogisticSearch(design, torch.from_numpy(labels[half] == 9).double())
    found, trace, converged = search.run(tol=1e-3, max_iter=1000)
    assert converged
    assert len(trace) < 50
    assert trace[-1] == found.log_evidence


def test_a_candidate_that_does_not_raise_the_evidence_is_taken_back(monkeypatch):
    search = make_search()
    monkeypatch.setattr(
        LogisticSearch,
        "_candidate",
        lambda self, mode, barred, tol: (next(i for i in range(6) if i not in barred), 40.0),
    )
    mode, _, converged = search.run(tol=1e-3, max_iter=50)
    assert converged
    assert mode.indices == []


def test_a_singular_precision_is_an_error_with_a_remedy():
    search = make_search()
    rows = search.design.rows(torch.tensor([0, 0]))
    with pytest.raises(ArithmeticError, match=r"2 weights is singular.*\n.*standardised inputs"):
        search.mode([0, 0], rows, np.full(2, -60.0), np.zeros(2), 0.0)
