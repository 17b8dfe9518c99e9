"""Things by name, and a helping hand when the name is not quite right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str]) -> str:
    """`` Did you mean "..."?`` for the closest of ``known``, case aside, or an empty string."""
    lower = {each.lower(): each for each in known}
    matches = difflib.get_close_matches(str(name).lower(), list(lower), n=1, cutoff=0.5)
    return f' Did you mean "{lower[matches[0]]}"?' if matches else ""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """The error for a name that stands for nothing: what is known, and what is closest."""
    known = list(known)
    return ValueError(
        f'unknown {kind} "{name}".{closest(str(name), known)} Known: {", ".join(known)}.'
    )
