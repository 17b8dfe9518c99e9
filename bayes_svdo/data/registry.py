"""The data sets by name."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable

from bayes_svdo._names import unknown_name
from bayes_svdo.data.bundled import load_diabetes, load_digits
from bayes_svdo.data.dataset import DataSet
from bayes_svdo.data.fetch import data_folders
from bayes_svdo.data.images import IDX_SETS, load_idx_set
from bayes_svdo.data.uci import UCI_SETS, load_uci

_BUNDLED: dict[str, Callable[[], DataSet]] = {"digits": load_digits, "diabetes": load_diabetes}


def available() -> tuple[str, ...]:
    """The names that :func:`load` knows, whether or not their files are on this machine."""
    return (*_BUNDLED, *IDX_SETS, *UCI_SETS)


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    split: int | None = None,
    progress: bool = True,
) -> DataSet:
    """Load a data set by its name.

    ========================================  ==============================  ==================
    name                                      inputs                          from
    ========================================  ==============================  ==================
    digits                                    (N, 1, 8, 8), float32, [0, 1]   scikit-learn
    diabetes                                  (N, 10), float64                scikit-learn
    mnist, fashion-mnist                      (N, 1, 28, 28), float32, [0, 1] files, or download
    boston, concrete, energy, kin8nm, yacht   (N, features), float64          files
    ========================================  ==============================  ==================

    Class labels are int64, regression targets float64, both of shape (N,).

    Args:
        name: One of :func:`available`.
        root: The folder to take files from, and to download them to. Without it they are
            searched in ``$BAYES_SVDO_DATA``, if set, then in the user's cache, which is also
            where downloads go. The sets of scikit-learn need no files.
        split: Which of the 20 published splits of a UCI set, 0 to 19; the first if not given.
            The other sets have one split.
        progress: Whether to show a progress bar while downloading to a terminal.

    Returns:
        The data set, on the CPU.

    Raises:
        ValueError: If the name is unknown, or there is no such split.
        DataNotFoundError: If ``root`` does not exist, or files are missing and cannot be
            downloaded; the message says what to put where.
        CorruptDataError: If a file is truncated, damaged or inconsistent; the message names it.
    """
    if name not in available():
        raise unknown_name("data set", name, available())
    if root is not None:
        data_folders(root)  # a folder that does not exist is an error for every set
    if name in UCI_SETS:
        return load_uci(name, root, split=0 if split is None else operator.index(split))
    if split is not None:
        raise ValueError(
            f"split={split!r} was given for data set {name!r}, which has one split; only "
            f"{', '.join(UCI_SETS)} have several. Leave split out, or hold out training rows "
            "with with_validation_split()."
        )
    if name in IDX_SETS:
        return load_idx_set(name, root, progress=progress)
    return _BUNDLED[name]()
