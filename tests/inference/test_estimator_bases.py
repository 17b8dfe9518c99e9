"""Arrays in, tensors on a device, arrays out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bayes_svdo.inference.estimator_bases import TorchEstimator, as_array, as_probabilities


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
