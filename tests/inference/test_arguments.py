"""Numbers and names that users pass."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from bayes_svdo.inference.arguments import (
    check_count,
    check_flag,
    check_functions,
    check_name,
    check_precision,
    check_rate,
    check_seed,
    check_threshold,
    check_weight,
    choose_device,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("value", [3, np.int32(3), np.uint8(3)])
def test_whole_numbers_of_any_kind_are_counts(value: Any) -> None:
    count = check_count("epochs", value)
    assert count == 3
    assert type(count) is int


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None, math.nan])
def test_what_is_no_count_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"epochs must be an integer of at least 1, but is"):
        check_count("epochs", value)


def test_zero_is_a_count_where_it_may_be() -> None:
    assert check_count("epochs", 0, least=0) == 0


@pytest.mark.parametrize("value", [True, False, 1, 0, np.True_, np.False_, np.int64(0)])
def test_what_is_true_or_false_is_a_flag(value: Any) -> None:
    assert check_flag("standardize", value) is bool(value)


@pytest.mark.parametrize("value", ["no", "", None, 2, -1, 0.0, 1.0, math.nan, [], np.zeros(2)])
def test_what_is_no_flag_is_refused_by_name(value: Any) -> None:
    message = re.escape(f"standardize must be True or False, got {value!r}.")
    with pytest.raises(TypeError, match=message):
        check_flag("standardize", value)


@pytest.mark.parametrize("value", [None, 3, True, ["fast"], np.ones(2)])
def test_what_is_no_name_is_refused(value: Any) -> None:
    assert check_name("kl", "exact") == "exact"
    with pytest.raises(TypeError, match=re.escape(f"kl must be a name, but is {value!r}.")):
        check_name("kl", value)


def test_a_seed_and_a_device_are_called_as_the_user_calls_them() -> None:
    with pytest.raises(ValueError, match="random_state must be an integer or None, but is 'a'"):
        check_seed("a", "random_state")
    with pytest.raises(ValueError, match="unknown device"):
        choose_device(np.ones(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, 0.1, np.float32(0.5), Fraction(1, 2)])
def test_positive_numbers_are_rates(value: Any) -> None:
    assert check_rate("lr", value) == pytest.approx(float(value))


@pytest.mark.parametrize("value", [0, -0.1, math.inf, math.nan, "0.1", None, True, 1j])
def test_what_is_no_rate_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match="lr must be a positive number, but is"):
        check_rate("lr", value)


@pytest.mark.parametrize("value", [3, -1.5, math.inf, -math.inf, np.float64(2.0)])
def test_any_number_is_a_threshold(value: Any) -> None:
    assert check_threshold(value) == float(value)


@pytest.mark.parametrize("value", [math.nan, "3", None, False])
def test_what_is_no_threshold_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"threshold must be a number \(log alpha\), but is"):
        check_threshold(value)


def test_a_seed_is_an_integer_or_none() -> None:
    assert check_seed(None) is None
    assert check_seed(np.int64(7)) == 7
    for seed in (1.5, "1", True):
        with pytest.raises(ValueError, match="seed must be an integer or None"):
            check_seed(seed)


def test_a_seed_is_one_that_torch_takes() -> None:
    for seed in (2**64 - 1, -(2**63)):
        torch.Generator().manual_seed(check_seed(seed))
    for seed in (2**64, -(2**63) - 1, 10**20):
        with pytest.raises(ValueError, match=f"seed must be an integer of 64 bits, but is {seed}"):
            check_seed(seed)


def test_functions_come_in_a_list() -> None:
    assert check_functions("callbacks", [print]) == (print,)
    assert check_functions("callbacks", iter([])) == ()
    with pytest.raises(TypeError, match=r"(?s)callbacks must be a list of functions, but is <bui"):
        check_functions("callbacks", print)
    with pytest.raises(TypeError, match="callbacks must be a list of functions, but is None"):
        check_functions("callbacks", None)
    with pytest.raises(TypeError, match="callbacks must be a list of functions, but holds None"):
        check_functions("callbacks", [print, None])


def test_unknown_precision_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r'unknown precision "bf16".*Did you mean "bf16-mixed"\?'):
        check_precision("bf16", CPU)


def test_half_precision_needs_a_gpu() -> None:
    check_precision("16-mixed", CUDA)
    with pytest.raises(ValueError, match=r'(?s)"16-mixed" needs a CUDA device.*"bf16-mixed"'):
        check_precision("16-mixed", CPU)


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_has_no_number(name: Any) -> None:
    assert choose_device(name) == CPU


@pytest.mark.parametrize("name", ["cudaa", "gpu", "meta", "mps", None, -1])
def test_unknown_device_lists_those_known(name: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown device.*Known: auto, cpu, cuda, cuda:0"):
        choose_device(name)


def test_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'device "cuda" is not available.*0 CUDA devices'):
        choose_device("cuda")
    assert choose_device("auto") == CPU


def test_devices_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == CUDA
    with pytest.raises(ValueError, match=r'device "cuda:2" is not available.*2 CUDA devices'):
        choose_device("cuda:2")


@pytest.mark.parametrize("value", [0, 0.5, np.float32(2.0), torch.tensor(0.5), torch.tensor(1)])
def test_numbers_and_scalar_tensors_are_weights(value: Any) -> None:
    check_weight("kl_weight", value)


@pytest.mark.parametrize("value", ["1", None, True, torch.ones(1), torch.tensor(True), [1.0]])
def test_what_is_no_number_is_no_weight(value: Any) -> None:
    with pytest.raises(TypeError, match="kl_weight must be a number or a scalar tensor, but is"):
        check_weight("kl_weight", value)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, torch.tensor(-1.0)])
def test_weights_are_finite_and_not_negative(value: Any) -> None:
    with pytest.raises(ValueError, match="kl_weight must be finite and not negative, but is"):
        check_weight("kl_weight", value)
