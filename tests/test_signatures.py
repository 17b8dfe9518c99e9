"""Functions that users pass, looked at before they are called."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from bayes_svdo._signatures import check_takes


class Counter:
    def __call__(self, end: object) -> None:
        """One argument besides self."""


@pytest.mark.parametrize(
    "function",
    [print, lambda *rest: None, lambda end, more=1: None, Counter(), [].append, dict, float],
)
def test_functions_that_take_it_pass(function: Any) -> None:
    check_takes("a callback", function, "the EpochEnd")


@pytest.mark.parametrize(
    "function",
    [lambda: None, lambda a, b: None, functools.partial(Counter(), 1), lambda *, end: None],
)
def test_functions_that_do_not_are_refused_by_name(function: Any) -> None:
    message = r"a callback must be a function of one argument, the EpochEnd, but .* cannot"
    with pytest.raises(TypeError, match=message):
        check_takes("a callback", function, "the EpochEnd")


def test_the_error_says_how_many_arguments_there_are() -> None:
    def choose(name: str) -> bool:
        return bool(name)

    message = "where must be a function of 2 arguments, the name and the tensor, but choose cannot"
    with pytest.raises(TypeError, match=message):
        check_takes("where", choose, "the name", "the tensor")
