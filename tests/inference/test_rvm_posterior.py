"""The posterior of a sparse function: intercept, weights and their variance."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from bayes_svdo.inference.relevance_vector_machine import fit_rvm_regression
from bayes_svdo.inference.rvm_posterior import check_representable


def machine(**settings):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator) + 2.0
    y = x[:, 3] - 2 * x[:, 1] + 0.3 * torch.randn(40, dtype=torch.float64, generator=generator) + 7
    return x, y, fit_rvm_regression(x, y, **settings)


def conjugate_posterior(x, y, found):
    """Mean and covariance of (intercept, weights) under a prior that is flat in the intercept."""
    phi = torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x[:, found.relevance]], 1)
    prior = torch.cat([torch.zeros(1, dtype=x.dtype), found.alpha])
    covariance = torch.linalg.inv(found.beta * phi.T @ phi + torch.diag(prior))
    return found.beta * covariance @ phi.T @ y, covariance


def test_intercept_and_weights_are_those_of_the_conjugate_posterior():
    x, y, found = machine()
    mean, covariance = conjugate_posterior(x, y, found)
    torch.testing.assert_close(found.intercept, mean[0])
    torch.testing.assert_close(found.weights, mean[1:])
    torch.testing.assert_close(found.intercept_variance, covariance[0, 0])
    torch.testing.assert_close(found.intercept_covariance, covariance[0, 1:])
    torch.testing.assert_close(found.covariance, covariance[1:, 1:])


def test_variance_of_the_function_includes_the_intercept():
    x, y, found = machine()
    mean, covariance = conjugate_posterior(x, y, found)
    new = torch.randn(9, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    phi = torch.cat([torch.ones(9, 1, dtype=x.dtype), new[:, found.relevance]], 1)
    latent, variance = found.latent(new)
    torch.testing.assert_close(latent, phi @ mean)
    torch.testing.assert_close(variance, (phi @ covariance * phi).sum(1))


def test_without_an_intercept_there_is_none():
    _, _, found = machine(fit_intercept=False)
    assert found.intercept == 0
    assert found.intercept_variance == 0
    assert (found.intercept_covariance == 0).all()


def test_coefficients_are_zero_exactly_where_irrelevant():
    x, _, found = machine()
    irrelevant = [i for i in range(5) if i not in found.relevance.tolist()]
    assert irrelevant
    assert (found.coefficients[irrelevant] == 0).all()
    torch.testing.assert_close(found.predict(x), x @ found.coefficients + found.intercept)


def test_relevance_is_in_ascending_order():
    _, _, found = machine(kernel="rbf")
    assert (found.relevance.diff() > 0).all()


def test_relevance_vectors_are_the_training_inputs():
    x, _, found = machine(kernel="rbf")
    assert torch.equal(found.relevance_vectors, x[found.relevance])


def test_what_a_kernel_does_not_have_is_an_error():
    _, _, linear = machine()
    with pytest.raises(AttributeError, match=r"kernel='linear' has no relevance vectors"):
        _ = linear.relevance_vectors
    _, _, rbf = machine(kernel="rbf")
    with pytest.raises(AttributeError, match=r'coefficients belong to kernel="linear".*\'rbf\''):
        _ = rbf.coefficients


def test_result_cannot_be_changed_and_does_not_change_with_the_data():
    x, _, found = machine(kernel="rbf")
    before = found.predict(x)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.weights = None
    new = x.clone()
    x.zero_()
    assert torch.equal(found.predict(new), before)


def test_predictions_can_be_differentiated_in_the_inputs():
    _, _, found = machine(kernel="rbf", gamma=0.2)
    point = torch.ones(1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: found.latent(p), point)


def test_on_another_device_it_is_the_same():
    x, _, found = machine()
    moved = found.to("meta")
    assert moved.device.type == moved.basis.indices.device.type == "meta"
    assert moved.covariance.shape == found.covariance.shape
    assert moved.beta == found.beta
    same = found.to(torch.device("cpu"))
    torch.testing.assert_close(same.predict(x), found.predict(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_out_of_range_are_refused(dtype):
    info = torch.finfo(dtype)
    one = torch.ones(2, dtype=dtype)
    check_representable(one.diag(), one, 4.0)
    check_representable(torch.empty(0, 0, dtype=dtype), one[:0])
    for bad in (0.0, info.tiny, info.max, math.inf, math.nan):
        for covariance, alpha in ((bad * one, one), (one, bad * one)):
            with pytest.raises(ValueError, match=rf"the range of {dtype}\.\n  Try rescaled x\."):
                check_representable(torch.diag_embed(covariance), alpha)
    for beta in (0.0, 1e-300, 1e300, math.inf):
        with pytest.raises(ValueError, match=r"deviation of 2\)(?s:.)*rescaled x or y"):
            check_representable(one.diag(), one, beta, unit=2.0)
