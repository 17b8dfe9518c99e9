"""The figures by name, written as pictures and as the numbers behind them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from matplotlib.figure import Figure

from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.figures import Canvas
from bayes_svdo.experiments import gradient_variance, kl_approximations, shrinkage
from bayes_svdo.experiments.files import replacing, write_csv

Rows = Sequence[Mapping[str, float | str]]


class _Drawn(NamedTuple):
    figure: Canvas
    rows: Rows


def _kl() -> _Drawn:
    result = kl_approximations.kl_approximations()
    return _Drawn(kl_approximations.plot_kl_approximations(result), result.rows())


def _gradient_variance() -> _Drawn:
    result = gradient_variance.compare_noise()
    return _Drawn(gradient_variance.plot_noise(result), result.rows())


def _shrinkage() -> _Drawn:
    result = shrinkage.shrinkage()
    return _Drawn(shrinkage.plot_shrinkage(result), result.rows())


FIGURES: dict[str, Callable[[], _Drawn]] = {
    "kl": _kl,
    "gradient-variance": _gradient_variance,
    "shrinkage": _shrinkage,
}
ALL = "all"


def write(name: str, out: str | os.PathLike[str]) -> list[Path]:
    """Compute a figure, draw it, and write ``<name>.png`` and ``<name>.csv``.

    Files of these names are replaced, each when the new one is complete.

    Args:
        name: One of ``FIGURES``, or ``"all"``.
        out: The folder, made if it is not there.

    Returns:
        The files.

    Raises:
        ValueError: Unknown ``name``.
        OSError: ``out`` is a file, or cannot be written to. Raised before anything is computed.
    """
    if name not in (*FIGURES, ALL):
        raise unknown_name("figure", name, (*FIGURES, ALL))
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {out} is a file; figures are written to a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out} cannot be written: no permission.")
    written = []
    for each in FIGURES if name == ALL else [name]:
        figure, rows = FIGURES[each]()
        picture, numbers = folder / f"{each}.png", folder / f"{each}.csv"
        with replacing(picture) as path:
            cast(Figure, figure).savefig(path)
        write_csv(numbers, rows)
        written += [picture, numbers]
    return written
