"""What changes over a training run: the weight of the KL and the learning rate.

A schedule is a function of progress, the fraction of steps done, in [0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bayes_svdo._signatures import check_takes

Schedule = Callable[[float], float]

_PROGRESS = "the fraction of training done"


@dataclass(frozen=True)
class KLWarmup:
    """KL weight 0 until ``start``, linear to ``end``, 1 from then on.

    From step 0 at full weight the KL prunes nearly everything: the other weights are still random,
    so each alone explains nothing (Molchanov et al. 2017 ramp over epochs 5 to 20 of 200).

    Args:
        start: Fraction of training at which the ramp begins.
        end: Fraction at which the weight reaches 1.

    Raises:
        ValueError: Not ``0 <= start <= end <= 1``.
    """

    start: float = 0.025
    end: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(
                "kl_warmup must be two fractions of training with 0 <= start <= end <= 1, but is "
                f"({self.start}, {self.end})."
            )

    def __call__(self, progress: float) -> float:
        """KL weight at ``progress``."""
        if progress >= self.end:
            return 1.0
        if progress <= self.start:
            return 0.0
        return (progress - self.start) / (self.end - self.start)


@dataclass(frozen=True)
class ConstantThenLinear:
    """Factor 1 until ``hold``, then linear to 0 at the end of training.

    Args:
        hold: Fraction of training before the decay. The authors' code holds for half.

    Raises:
        ValueError: Not ``0 <= hold <= 1``.
    """

    hold: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.hold <= 1.0:
            raise ValueError(f"hold must be a fraction of training, but is {self.hold}.")

    def __call__(self, progress: float) -> float:
        """Factor on the learning rate at ``progress``."""
        if progress <= self.hold:
            return 1.0
        return (1.0 - progress) / (1.0 - self.hold)


def as_warmup(kl_warmup: Schedule | tuple[float, float]) -> Schedule:
    """A schedule of the KL weight, from one or from the two fractions of :class:`KLWarmup`.

    Raises:
        TypeError: It is neither, or a function of something else.
        ValueError: The fractions are not ``0 <= start <= end <= 1``.
    """
    if callable(kl_warmup):
        check_takes("kl_warmup", kl_warmup, _PROGRESS)
        return kl_warmup
    try:
        start, end = (float(fraction) for fraction in kl_warmup)
    except (TypeError, ValueError):
        raise TypeError(
            "kl_warmup must be a function of the fraction of training done, or a pair of such "
            f"fractions, but is {kl_warmup!r}."
        ) from None
    return KLWarmup(start, end)


def as_lr_schedule(lr_schedule: Schedule | None) -> Schedule:
    """A schedule of the learning rate; the default one for None.

    Raises:
        TypeError: It is not a function of one argument.
    """
    if lr_schedule is None:
        return ConstantThenLinear()
    given: object = lr_schedule
    if not callable(given):
        raise TypeError(f"lr_schedule must be a function of {_PROGRESS}, but is {lr_schedule!r}.")
    check_takes("lr_schedule", lr_schedule, _PROGRESS)
    return lr_schedule


def value_at(schedule: Schedule, progress: float, name: str) -> float:
    """The schedule's value at ``progress``.

    Raises:
        TypeError: It is no number.
        ValueError: It is negative, NaN or infinite.
    """
    given: Any = schedule(progress)
    try:
        if isinstance(given, str):
            raise TypeError
        value = float(given)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name} must give numbers, but gives {given!r} at progress {progress:.3g}."
            + ("\n  Try a return statement in it." if given is None else "")
        ) from None
    if not 0 <= value < math.inf:
        raise ValueError(
            f"{name} must give numbers that are finite and not negative, but gives {value} at "
            f"progress {progress:.3g}."
        )
    return value
