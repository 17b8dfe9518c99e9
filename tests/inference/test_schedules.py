"""The weight of the KL and the learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayes_svdo.inference import ConstantThenLinear, KLWarmup
from bayes_svdo.inference.schedules import as_lr_schedule, as_warmup, value_at

FRACTION = st.floats(0, 1)


@pytest.mark.parametrize(
    ("progress", "weight"),
    [(0.0, 0.0), (0.1, 0.0), (0.2, 0.0), (0.3, 0.25), (0.4, 0.5), (0.6, 1.0), (0.99, 1.0)],
)
def test_kl_weight_is_zero_then_a_ramp_then_one(progress: float, weight: float) -> None:
    assert KLWarmup(0.2, 0.6)(progress) == pytest.approx(weight, abs=1e-15)


def test_the_papers_ramp() -> None:
    """Epochs 5 to 20 of 200: (epoch - 5) / 15."""
    warmup = KLWarmup()
    for epoch in range(200):
        expected = min(max((epoch - 5) / 15, 0.0), 1.0)
        assert warmup(epoch / 200) == pytest.approx(expected, abs=1e-12)


def test_no_warmup_is_full_weight_from_the_first_step() -> None:
    assert KLWarmup(0.0, 0.0)(0.0) == 1.0


@given(start=FRACTION, end=FRACTION, progress=FRACTION, later=FRACTION)
def test_kl_weight_is_a_fraction_that_never_falls(
    start: float, end: float, progress: float, later: float
) -> None:
    start, end = sorted((start, end))
    progress, later = sorted((progress, later))
    warmup = KLWarmup(start, end)
    assert 0.0 <= warmup(progress) <= warmup(later) <= 1.0


@pytest.mark.parametrize(
    ("progress", "factor"), [(0.0, 1.0), (0.5, 1.0), (0.75, 0.5), (0.9, 0.2), (1.0, 0.0)]
)
def test_learning_rate_is_constant_then_linear_to_zero(progress: float, factor: float) -> None:
    assert ConstantThenLinear()(progress) == pytest.approx(factor, abs=1e-15)


def test_learning_rate_may_be_constant() -> None:
    assert ConstantThenLinear(hold=1.0)(1.0) == 1.0


@pytest.mark.parametrize(
    "pair", [(-0.1, 0.5), (0.5, 0.1), (0.0, 1.1), (math.nan, 0.5), (0, math.nan)]
)
def test_fractions_out_of_order_are_refused(pair: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"kl_warmup must be two fractions.*but is \("):
        KLWarmup(*pair)


@pytest.mark.parametrize("hold", [-0.1, 1.1, math.nan])
def test_hold_that_is_no_fraction_is_refused(hold: float) -> None:
    with pytest.raises(ValueError, match="hold must be a fraction"):
        ConstantThenLinear(hold)


@pytest.mark.parametrize("given", [(0.1, 0.4), [0.1, 0.4], KLWarmup(0.1, 0.4)])
def test_a_warmup_is_a_pair_or_a_function(given: Any) -> None:
    assert as_warmup(given) == KLWarmup(0.1, 0.4)


@pytest.mark.parametrize("given", [0.1, (0.1,), (0.1, 0.2, 0.3), "linear", ("a", "b"), None])
def test_a_warmup_that_is_neither_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"kl_warmup must be a function.*or a pair"):
        as_warmup(given)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_schedule_that_gives_no_weight_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match=r"lr_schedule must give.*at progress 0.25"):
        value_at(lambda progress: value, 0.25, "lr_schedule")


@pytest.mark.parametrize("value", [None, "0.5", "half", [0.5], 1j, torch.ones(2)])
def test_schedule_that_gives_no_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"kl_warmup must give numbers, but gives .* 0.25\."):
        value_at(lambda progress: value, 0.25, "kl_warmup")


@pytest.mark.parametrize("value", [1, True, np.float32(1.0), torch.tensor(1.0)])
def test_numbers_of_any_kind_are_values(value: Any) -> None:
    assert value_at(lambda progress: value, 0.25, "kl_warmup") == 1.0


def test_a_schedule_of_other_arguments_is_refused() -> None:
    words = "must be a function of one argument, the fraction of training done, but <lambda> cannot"
    with pytest.raises(TypeError, match=f"kl_warmup {words}"):
        as_warmup(lambda: 1.0)  # type: ignore[arg-type,misc]
    with pytest.raises(TypeError, match=f"lr_schedule {words}"):
        as_lr_schedule(lambda step, epoch: 1.0)  # type: ignore[arg-type,misc]


def test_a_learning_rate_schedule_is_a_function_or_the_default() -> None:
    assert as_lr_schedule(None) == ConstantThenLinear()
    assert as_lr_schedule(abs) is abs
    with pytest.raises(TypeError, match=r"lr_schedule must be a function of the .*but is 0\.5"):
        as_lr_schedule(0.5)  # type: ignore[arg-type]
