"""Functions that users pass, looked at before they are called."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any


def check_takes(name: str, function: Callable[..., Any], *arguments: str) -> None:
    """Refuse a function that cannot be called with so many arguments.

    Args:
        name: What to call the function in the error message.
        function: A callable; one without a signature passes.
        arguments: What it will be called with, in words.

    Raises:
        TypeError: As said.
    """
    try:
        bind = signature(function).bind
    except (TypeError, ValueError):  # has no signature
        return
    try:
        bind(*arguments)
    except TypeError as error:
        shown = getattr(function, "__name__", type(function).__name__)
        expected = f"{len(arguments)} arguments, " if len(arguments) > 1 else "one argument, "
        raise TypeError(
            f"{name} must be a function of {expected}{' and '.join(arguments)}, but {shown} "
            f"cannot take that: {error}."
        ) from None
