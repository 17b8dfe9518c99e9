"""Arrays in, tensors on a device, arrays out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayes_svdo.inference.estimator_bases import (
    TorchEstimator,
    as_array,
    as_probabilities,
    standardized,
)


class Estimator(TorchEstimator):
    """Only what the base has."""

    def __init__(self, device="cpu"):
        self.device = device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_tensors_become_arrays_of_the_same_values(dtype):
    values = torch.tensor([1, 2, -3]).to(dtype).requires_grad_(dtype.is_floating_point)
    assert as_array(values).tolist() == [1, 2, -3]
    assert as_array("anything else") == "anything else"


def test_logits_become_probabilities():
    one = np.array([-2.0, 0.0, 700.0])
    expected = np.stack([1 / (1 + np.exp(one)), 1 / (1 + np.exp(-one))], 1)
    np.testing.assert_allclose(as_probabilities(one), expected, atol=1e-300)
    several = as_probabilities(np.array([[1.0, 1.0, 1.0 + np.log(2)]]))
    np.testing.assert_allclose(several, [[0.25, 0.25, 0.5]])


def test_read_only_and_strided_arrays_are_taken():
    x = np.arange(12.0).reshape(3, 4)[:, ::2]
    x.flags.writeable = False
    tensor = Estimator()._tensor(x)
    assert tensor.tolist() == x.tolist()
    tensor[0, 0] = 5.0  # a copy
    assert x[0, 0] == 0


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="device"):
        Estimator("gpu0")._tensor(np.zeros((2, 2)))


@pytest.mark.parametrize("each", [True, False])
def test_standardised_features_are_the_same_in_any_units(each):
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= 4
    mean, scale = x.mean(0), x.std(0, correction=0)
    scale = scale if each else scale.square().mean().sqrt().expand(3)
    for unit in (2.0**-1000, 1.0, 2.0**1000):  # powers of 2, which round nothing
        inputs, found_mean, found_scale = standardized(x * unit, each=each)
        assert torch.allclose(inputs, (x - mean) / scale)
        assert torch.allclose(found_mean, mean * unit, atol=0)
        assert torch.allclose(found_scale, scale * unit, atol=0)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e300, 1e-300])
def test_a_feature_that_is_constant_up_to_rounding_becomes_zero(value, each):
    x = torch.full((7, 2), value, dtype=torch.float64)
    x[:, 0] = torch.arange(7)
    x[2, 1] *= 1 + 2**-52
    inputs, mean, scale = standardized(x, each=each)
    assert not inputs[:, 1].any()
    assert inputs[:, 0].std(correction=0) == pytest.approx(1 if each else 2**0.5)
    assert mean[1] == pytest.approx(value)
    assert scale[1] == pytest.approx(abs(value) or 1, rel=1)


def test_features_without_a_reciprocal_are_refused():
    with pytest.raises(ValueError, match="overflow; rescale"):
        standardized(torch.tensor([[0.0], [1e-310]], dtype=torch.float64), each=True)
