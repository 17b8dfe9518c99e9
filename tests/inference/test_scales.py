"""Powers of 2 take a scale off without a rounding."""

from __future__ import annotations

import pytest
import torch

from bayes_svdo.inference.scales import power_of_2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_division_by_the_power_leaves_one_to_two_and_can_be_undone(dtype) -> None:
    info = torch.finfo(dtype)
    sizes = torch.tensor([info.tiny, 0.3, 1.0, 2.0, 1e3, info.max], dtype=dtype)
    left = sizes / power_of_2(sizes)
    assert (left >= 1).all()
    assert (left < 2).all()
    assert torch.equal(left * power_of_2(sizes), sizes)


def test_zero_and_the_smallest_numbers_have_a_power() -> None:
    assert power_of_2(torch.tensor(0.0)) == 1
    smallest = torch.tensor(5e-324, dtype=torch.float64)
    assert power_of_2(smallest) == smallest
