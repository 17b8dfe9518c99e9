"""What users hand over, as tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bayes_svdo.inference.inputs import as_tensor, inputs_of

TABLE = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0]}, index=[5, 2])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (TABLE, [[1.0, 3.0], [2.0, 4.0]]),
        (TABLE["b"], [3.0, 4.0]),
        (np.array([3, 4])[::-1], [4, 3]),
        ([3.0, 4.0], [3.0, 4.0]),
        ((1, 2), [1, 2]),
        (pd.Series([True, False]), [True, False]),
    ],
)
def test_tables_columns_arrays_and_lists_are_tensors(value: Any, expected: list[Any]) -> None:
    found = as_tensor(value, "y")
    assert found.tolist() == expected
    assert as_tensor(found, "y") is found


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (None, TypeError, "y must be a tensor or an array, but is a NoneType"),
        ("labels", TypeError, "but is a str"),
        (DataLoader(TensorDataset(torch.zeros(2))), TypeError, "but is a DataLoader"),
        (["cat", "dog"], TypeError, "y must be numbers in a tensor or an array"),
        ([None, 1.0], TypeError, "y must be numbers"),
        (pd.Series(["cat", "dog"]), TypeError, "y must hold numbers, but is of dtype"),
        (np.array(["cat"]), TypeError, "y must hold numbers, but is of dtype <U3"),
        (pd.Series([1.0, None]), ValueError, "y holds NaN or inf, in 1 of 2"),
        ([1.0, math.inf], ValueError, "y holds NaN or inf"),
        (np.float64(1.0), ValueError, "y must have data points along its first dimension"),
    ],
)
def test_anything_else_is_refused_by_name(value: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        as_tensor(value, "y")


def test_inputs_are_of_one_length() -> None:
    x = torch.zeros(3, 2)
    assert inputs_of(x) == (x,)
    pair = inputs_of((x, TABLE["a"].to_numpy()[[0, 0, 1]]))
    assert [value.shape for value in pair] == [(3, 2), (3,)]
    with pytest.raises(ValueError, match=r"x\[1\] has 2 data points, but x\[0\] 3"):
        inputs_of((x, x[:2]))
    for empty in ((), x[:0], (x[:0], x[:0])):
        with pytest.raises(ValueError, match="x is empty"):
            inputs_of(empty)
    with pytest.raises(TypeError, match=r"x\[1\] must be a tensor or an array, but is a NoneType"):
        inputs_of((x, None))
