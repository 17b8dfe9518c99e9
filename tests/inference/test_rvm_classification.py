"""Relevance vector classification: probabilities, classes, and data at the edge."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.datasets import load_digits, make_moons
from sklearn.exceptions import ConvergenceWarning

from bayes_svdo.inference.rvm_classification import fit_rvm_classification


def sparse_data(n: int = 150, d: int = 10, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator) + 1.0
    odds = 2 * x[:, 0] - 1.5 * x[:, 2] - 1.0
    return x, (torch.rand(n, dtype=torch.float64, generator=generator) < odds.sigmoid()).long()


def three_classes(n: int = 150, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    centres = torch.tensor([[0.0, 2.0], [2.0, -1.0], [-2.0, -1.0]], dtype=torch.float64)
    x = centres[y] + torch.randn(n, 2, dtype=torch.float64, generator=generator)
    return torch.cat([x, torch.randn(n, 6, dtype=torch.float64, generator=generator)], 1), y


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_weights_and_intercept_are_at_the_mode_in_units_of_the_data(fit_intercept):
    x, t = sparse_data()
    x = x * torch.logspace(-3, 3, 10, dtype=torch.float64)
    (found,) = fit_rvm_classification(x, t, fit_intercept=fit_intercept).machines
    phi = x[:, found.relevance]
    residual = t - (phi @ found.weights + found.intercept).sigmoid()
    slope = phi.T @ residual - found.alpha * found.weights
    # Exact to 1e-10 nats: slope^2 / 2 over a curvature of at most phi^2 / 4.
    assert (slope / phi.norm(dim=0)).abs().max() < 1e-5
    assert abs(float(residual.sum())) < 1e-5 * len(x) ** 0.5 or not fit_intercept


def test_posterior_is_that_of_laplace_in_units_of_the_data():
    x, t = sparse_data()
    (found,) = fit_rvm_classification(x, t).machines
    phi = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x[:, found.relevance]], 1)
    p = (phi @ torch.cat([found.intercept[None], found.weights])).sigmoid()
    prior = torch.cat([torch.zeros(1, dtype=x.dtype), found.alpha])
    covariance = torch.linalg.inv((phi.T * p * (1 - p)) @ phi + torch.diag(prior))
    torch.testing.assert_close(found.covariance, covariance[1:, 1:])
    torch.testing.assert_close(found.intercept_variance, covariance[0, 0])
    torch.testing.assert_close(found.intercept_covariance, covariance[0, 1:])
    _, variance = found.latent(x)
    torch.testing.assert_close(variance, (phi @ covariance * phi).sum(1))


def test_moderated_probabilities_are_averages_over_the_posterior():
    """MacKay's formula is off by at most 0.02; 20,000 draws add a standard error below 0.0036."""
    x, t = sparse_data(n=60)
    machine = fit_rvm_classification(x, t)
    mean, variance = machine.machines[0].latent(x)
    draws = np.random.default_rng(0).normal(size=(20_000, 1))
    averages = expit(mean.numpy() + draws * variance.sqrt().numpy()).mean(0)
    found = machine.predict_proba(x)[:, 1].numpy()
    assert np.abs(found - averages).max() < 0.03
    plain = machine.predict_proba(x, moderated=False)[:, 1].numpy()
    np.testing.assert_allclose(plain, expit(mean.numpy()), rtol=1e-12)
    assert np.abs(plain - averages).max() > np.abs(found - averages).max()


def test_moderation_draws_towards_one_half_and_changes_no_decision():
    x, t = sparse_data()
    machine = fit_rvm_classification(x, t)
    moderated, plain = (machine.predict_proba(x, moderated=m)[:, 1] - 0.5 for m in (True, False))
    assert (moderated.sign() == plain.sign()).all()
    assert (moderated.abs() < plain.abs()).all()


def test_two_classes_share_one_machine():
    x, t = sparse_data()
    found = fit_rvm_classification(x, 7 - 3 * t)  # labels 7 and 4
    assert found.classes.tolist() == [4, 7]
    assert len(found.machines) == 1
    assert found.decision_function(x).shape == (150,)
    proba = found.predict_proba(x)
    assert proba.shape == (150, 2)
    torch.testing.assert_close(proba.sum(1), torch.ones(150, dtype=x.dtype))
    assert torch.equal(found.predict(x), torch.where(proba[:, 1] > 0.5, 7, 4))
    assert {0, 2} <= set(found.relevance.tolist())


def test_swapping_two_labels_swaps_the_answer():
    x, t = sparse_data()
    found, swapped = fit_rvm_classification(x, t), fit_rvm_classification(x, 1 - t)
    torch.testing.assert_close(swapped.predict_proba(x).flip(1), found.predict_proba(x))


def test_every_class_of_many_has_its_own_weights():
    x, y = three_classes()
    found = fit_rvm_classification(x, y + 5)
    assert found.classes.tolist() == [5, 6, 7]
    assert found.decision_function(x).shape == (150, 3)
    proba = found.predict_proba(x)
    torch.testing.assert_close(proba.sum(1), torch.ones(150, dtype=x.dtype))
    assert torch.equal(found.predict(x), proba.argmax(1) + 5)
    assert float((found.predict(x) == y + 5).double().mean()) > 0.85
    for k, machine in enumerate(found.machines):
        alone = fit_rvm_classification(x, (y == k).long()).machines[0]
        torch.testing.assert_close(machine.coefficients, alone.coefficients)
    expected = sorted({i for m in found.machines for i in m.relevance.tolist()})
    assert found.relevance.tolist() == expected
    assert found.n_iter == max(m.n_iter for m in found.machines)


def test_probabilities_far_from_every_class_are_still_probabilities():
    x, y = three_classes()
    found = fit_rvm_classification(x, y)
    proba = found.predict_proba(1e8 * x, moderated=False)
    assert proba.isfinite().all()
    torch.testing.assert_close(proba.sum(1), torch.ones(150, dtype=x.dtype))


def test_kernels_bend_the_boundary():
    """Moons overlap at this noise: Bayes' accuracy is about 0.92."""
    x, t = map(torch.from_numpy, make_moons(400, noise=0.3, random_state=0))
    new_x, new_t = map(torch.from_numpy, make_moons(2000, noise=0.3, random_state=1))
    found = fit_rvm_classification(x, t, kernel="rbf", gamma=1.0)
    assert float((found.predict(new_x) == new_t).double().mean()) > 0.89
    assert len(found.relevance) < 15


def test_digits_need_few_pixels_each():
    """Poster's experiment: the RVM had 94.5 % at a sparsity of 74.6 % on a half of the digits."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16), torch.from_numpy(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:600], order[600:]
    keep = y[train] < 4  # four classes of the ten, to be quick
    found = fit_rvm_classification(x[train][keep], y[train][keep])
    few = y[test] < 4
    assert float((found.predict(x[test][few]) == y[test][few]).double().mean()) > 0.95
    zeros = [float((m.coefficients == 0).double().mean()) for m in found.machines]
    assert np.mean(zeros) > 0.75


@pytest.mark.parametrize("scale", [1000.0, 1e-6])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_scaling_the_inputs_scales_the_weights_and_nothing_else(kernel, scale):
    x, t = sparse_data()
    found = fit_rvm_classification(x, t, kernel=kernel)
    scaled = fit_rvm_classification(x * scale, t, kernel=kernel)
    assert torch.equal(scaled.relevance, found.relevance)
    # The search stops where no log precision moves by 1e-5.
    torch.testing.assert_close(
        scaled.predict_proba(x * scale), found.predict_proba(x), atol=1e-4, rtol=0
    )
    evidence, expected = (m.machines[0].log_evidence[-1] for m in (scaled, found))
    torch.testing.assert_close(evidence, expected, atol=1e-4, rtol=0)


def test_a_kernel_not_kept_in_memory_gives_the_same_machine():
    x, t = sparse_data()
    kept = fit_rvm_classification(x, t, kernel="rbf")
    again = fit_rvm_classification(x, t, kernel="rbf", max_kernel_bytes=0)
    assert torch.equal(again.relevance, kept.relevance)
    torch.testing.assert_close(again.predict_proba(x), kept.predict_proba(x))


# The older updates.


@pytest.mark.parametrize("method", ["mackay", "em"])
@pytest.mark.parametrize("data", [sparse_data, three_classes])
def test_methods_agree_where_there_is_one_maximum(data, method):
    x, y = data()
    fast = fit_rvm_classification(x, y)
    other = fit_rvm_classification(x, y, method=method, tol=1e-5, max_iter=5000)
    assert other.converged
    for ours, theirs in zip(other.machines, fast.machines, strict=True):
        assert torch.equal(ours.relevance, theirs.relevance)
        assert float(ours.log_evidence[-1] - theirs.log_evidence[-1]) == pytest.approx(0, abs=1e-3)
        torch.testing.assert_close(ours.coefficients, theirs.coefficients, atol=2e-2, rtol=0)
    assert other.n_iter > fast.n_iter


@pytest.mark.parametrize("method", ["mackay", "em"])
@pytest.mark.parametrize("data", [sparse_data, three_classes])
def test_methods_end_at_maxima_that_are_nearly_as_high(data, method):
    """With a kernel there are many: neighbouring basis functions are nearly alike."""
    x, y = data(n=80)
    fast = fit_rvm_classification(x, y, kernel="rbf")
    other = fit_rvm_classification(x, y, kernel="rbf", method=method)
    none = fit_rvm_classification(torch.ones_like(x), y)
    assert other.converged
    for machines in zip(other.machines, fast.machines, none.machines, strict=True):
        ours, theirs, empty = (float(m.log_evidence[-1]) for m in machines)
        assert ours - empty == pytest.approx(theirs - empty, rel=0.05)
        assert len(machines[0].relevance) <= 16 < 80
    same = other.predict(x) == fast.predict(x)
    assert float(same.double().mean()) > 0.9


@pytest.mark.parametrize("method", ["mackay", "em"])
def test_older_updates_survive_separable_classes(method):
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).unsqueeze(1)
    t = (x[:, 0] > 0).long()
    found = fit_rvm_classification(x, t, kernel="rbf", method=method)
    assert found.converged
    assert torch.equal(found.predict(x), t)
    assert found.machines[0].weights.isfinite().all()


@pytest.mark.parametrize("method", ["fast", "mackay", "em"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_float32_stays_float32_and_agrees(kernel, method):
    x, t = sparse_data(n=80)
    double = fit_rvm_classification(x, t, kernel=kernel, method=method)
    single = fit_rvm_classification(x.float(), t, kernel=kernel, method=method)
    assert single.machines[0].weights.dtype == torch.float32
    proba = single.predict_proba(x.float())
    assert proba.dtype == torch.float32
    assert (proba.double() - double.predict_proba(x)).abs().max() < 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["fast", "mackay", "em"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cuda_agrees_with_cpu(kernel, method):
    x, y = three_classes()
    cpu = fit_rvm_classification(x, y, kernel=kernel, method=method)
    cuda = fit_rvm_classification(x.cuda(), y.cuda(), kernel=kernel, method=method)
    assert cuda.predict(x.cuda()).is_cuda
    found = cuda.predict_proba(x.cuda()).cpu()
    torch.testing.assert_close(found, cpu.predict_proba(x), atol=1e-3, rtol=0)


# Data at the edge.


def test_separable_classes_have_finite_weights():
    x = torch.linspace(-1, 1, 40, dtype=torch.float64).unsqueeze(1)
    t = (x[:, 0] > 0).long()
    for kernel in ("linear", "rbf"):
        found = fit_rvm_classification(x, t, kernel=kernel)
        assert torch.equal(found.predict(x), t)
        assert found.machines[0].weights.isfinite().all()
        assert found.converged


def test_labels_unrelated_to_the_inputs_leave_their_frequency():
    """A feature that says nothing, exactly: the intercept is the log odds of the classes."""
    t = torch.tensor([0, 0, 0, 1] * 10)
    x = torch.tensor([1.0, -1.0] * 20, dtype=torch.float64).unsqueeze(1)
    x = torch.cat([x * torch.tensor([1.0, 1, 1, 0] * 10).double()[:, None], torch.ones_like(x)], 1)
    found = fit_rvm_classification(x[:, 1:], t)
    assert len(found.relevance) == 0
    assert float(found.machines[0].intercept) == pytest.approx(math.log(1 / 3))
    # Moderated for the uncertainty of the intercept, 1 / (40 * 3 / 16).
    odds = math.log(1 / 3) / math.sqrt(1 + math.pi / 8 / 7.5)
    assert float(found.predict_proba(x[:1, 1:])[0, 1]) == pytest.approx(expit(odds))


def test_constant_and_repeated_columns_change_nothing():
    x, t = sparse_data()
    once = fit_rvm_classification(x, t)
    more = torch.cat([x, torch.full_like(x[:, :1], 0.1), 3 - 2 * x], 1)
    found = fit_rvm_classification(more, t)
    assert sorted(i % 11 for i in found.relevance.tolist()) == once.relevance.tolist()
    torch.testing.assert_close(found.predict_proba(more), once.predict_proba(x), atol=1e-3, rtol=0)


def test_two_samples_can_be_told_apart():
    x, _ = sparse_data()
    found = fit_rvm_classification(x[:2], torch.tensor([1, 0]))
    assert found.predict(x[:2]).tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32])
def test_labels_may_be_of_any_discrete_type(dtype):
    x, t = sparse_data()
    found = fit_rvm_classification(x, t.to(dtype))
    assert found.predict(x).dtype == dtype
    expected = fit_rvm_classification(x, t).predict(x)
    assert torch.equal(found.predict(x).long(), expected)


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (torch.zeros(150), r"single class, \[0.0\]; at least two"),
        (torch.linspace(0, 1, 150), r"(?s)not integers, so they are no labels.*fit_rvm_regression"),
    ],
)
def test_what_is_no_classification_is_refused(y, words):
    with pytest.raises(ValueError, match=words):
        fit_rvm_classification(sparse_data()[0], y)


@pytest.mark.parametrize("settings", [{"tol": -1.0}, {"max_iter": 0}, {"kernel": "cosine"}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        fit_rvm_classification(*sparse_data(), **settings)


def test_an_unknown_method_is_refused_with_those_there_are():
    words = r"method must be one of \('fast', 'mackay', 'em'\), got 'slow'"
    with pytest.raises(ValueError, match=words):
        fit_rvm_classification(*sparse_data(), method="slow")


@pytest.mark.parametrize("method", ["fast", "mackay", "em"])
def test_too_few_rounds_are_reported_at_the_caller(method):
    x, y = three_classes()
    with pytest.warns(ConvergenceWarning, match=r"max_iter = 1 rounds.*3 of 3 mach") as caught:
        found = fit_rvm_classification(x, y, method=method, max_iter=1)
    assert caught[0].filename == __file__
    assert not found.converged


def test_a_full_search_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fit_rvm_classification(*three_classes()).converged


def test_features_so_large_that_a_variance_underflows_are_an_error():
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]
    y = (x[:, 0] + 0.5 * torch.sin(30 * x[:, 0]) > 0).long()
    plain, scaled = fit_rvm_classification(x, y), fit_rvm_classification(x * 1e100, y)
    torch.testing.assert_close(scaled.predict_proba(x * 1e100), plain.predict_proba(x))
    with pytest.raises(ValueError, match=r"(?s)the range of torch.float64.*Try rescaled x\."):
        fit_rvm_classification(x * 1e149, y)


def test_on_another_device_the_machines_go_along():
    x = torch.linspace(-1, 1, 30, dtype=torch.float64)[:, None]
    found = fit_rvm_classification(x, (x[:, 0] + 0.5 * torch.sin(30 * x[:, 0]) > 0).long())
    moved = found.to("meta")
    assert moved.device.type == moved.machines[0].device.type == "meta"
    assert torch.equal(found.to("cpu").predict(x), found.predict(x))
