"""What can be wrong with a data set's files: they are not there, or they are not what they say."""

from __future__ import annotations


class DataNotFoundError(FileNotFoundError):
    """No files and no way to get them; the message says what to put where."""


class CorruptDataError(ValueError):
    """A file is there, but truncated, damaged or inconsistent; the message names it."""
