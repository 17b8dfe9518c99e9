"""The poster's experiment: VD-ARD beside L1 and the RVM. What ``bayes-svdo compare`` does.

====================  =============================================================
``config.json``       settings of the comparison and its methods, versions, machine
``summary.json``      every result, and mean and standard deviation over the seeds
``results.csv``       one row per data set, seed and method
``summary.csv``       one row per data set and method, the poster's numbers beside it
``NAME.npz``          an object and VD-ARD's log dropout rates, of the first seed
``NAME.png``          a picture of these
====================  =============================================================

The files are replaced, each whole, after every result; an unfinished comparison can be
continued.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from rich.table import Table

from bayes_svdo.experiments import compare_methods, runs
from bayes_svdo.experiments.compare_figure import plot_dropout_rates
from bayes_svdo.experiments.compare_methods import (
    DIGITS,
    L1,
    L1_SETTINGS,
    METHODS,
    MNIST,
    NOISY_DIGITS,
    RVM,
    VDARD,
    VDARD_SETTINGS,
    Outcome,
    Task,
)
from bayes_svdo.experiments.files import beside, replacing, write_csv, write_json
from bayes_svdo.experiments.runs import CONFIG, RunError
from bayes_svdo.inference.arguments import check_count, choose_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

COMMAND = "compare"
# Molchanov, Ashukha & Vetrov (2016): accuracy and sparsity, percent; one run each, it seems.
POSTER = {
    (DIGITS, VDARD): (94.8, 75.4),
    (DIGITS, L1): (95.5, 38.0),
    (DIGITS, RVM): (94.5, 74.6),
    (NOISY_DIGITS, VDARD): (93.0, 87.6),
    (NOISY_DIGITS, L1): (93.7, 55.9),
    (NOISY_DIGITS, RVM): (84.6, 85.7),
    (MNIST, VDARD): (92.6, 69.8),
    (MNIST, L1): (91.9, 57.8),
}
_FORMAT = 1
_SUMMARY, _RESULTS_CSV, _SUMMARY_CSV = "summary.json", "results.csv", "summary.csv"
_FILES = frozenset(
    {CONFIG, _SUMMARY, _RESULTS_CSV, _SUMMARY_CSV}
    | {f"{name}{suffix}" for name in METHODS for suffix in (".npz", ".png")}
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is compared; the fields are the arguments of ``bayes-svdo compare``.

    Attributes:
        data: Names from ``METHODS``.
        seeds: Number of seeds, from 0 on: of the division, the noise features, and of what
            training draws.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        root: Folder of MNIST's files; see :func:`bayes_svdo.data.load`.
    """

    data: tuple[str, ...] = (DIGITS, NOISY_DIGITS)
    seeds: int = 10
    device: str = "auto"
    root: str | None = None

    def cells(self) -> list[tuple[str, int, str]]:
        """Data set, seed and method of every result, in order."""
        return [
            (name, seed, method)
            for name in self.data
            for seed in range(self.seeds)
            for method in METHODS[name]
        ]


@dataclass(frozen=True)
class Comparison:
    """Results, all or those so far.

    Attributes:
        config: What was run: ``settings``, ``methods``, ``versions``, ``machine``.
        results: One per data set, seed and method: these, and the fields of
            :class:`~bayes_svdo.experiments.compare_methods.Outcome` but ``log_alpha``.
        interrupted: Whether Ctrl-C ended it.
    """

    config: dict[str, Any]
    results: list[Row]
    interrupted: bool = False

    @property
    def num_cells(self) -> int:
        """How many results there are when it is complete."""
        settings = self.config["settings"]
        return len(Settings(tuple(settings["data"]), settings["seeds"]).cells())

    def summary(self) -> list[Row]:
        """Mean and standard deviation over seeds, per data set and method."""
        return [
            _summarise(name, method, rows)
            for name in self.config["settings"]["data"]
            for method in METHODS[name]
            if (rows := [r for r in self.results if (r["data"], r["method"]) == (name, method)])
        ]

    def report(self) -> list[RenderableType]:
        """For a terminal: the table beside the poster's."""
        table = Table(title="Linear classifiers: mean ± sd over seeds, beside the poster (2016)")
        for heading in _HEADINGS:
            table.add_column(heading, justify="left" if heading in _HEADINGS[:2] else "right")
        name = None
        for row in self.summary():
            if name not in (None, row["data"]):
                table.add_section()
            name = row["data"]
            table.add_row(*_cells(row))
        return [table, *([""] if self.results else []), _CAPTION]

    def to_markdown(self) -> str:
        """The table of :meth:`report`."""
        lines = [_HEADINGS, ["---"] * len(_HEADINGS), *map(_cells, self.summary())]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"{table}\n\n{_CAPTION}\n"


def run(
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    tell: Callable[[Row], None] = lambda row: None,
) -> tuple[Comparison, list[Path]]:
    """Fit every method to every data set and seed, and write each result as it comes.

    An unfinished comparison in ``out`` of the same settings and versions is continued. Ctrl-C
    ends it early and leaves what it found; before the first result it leaves nothing.

    Args:
        settings: What to compare.
        out: The folder.
        overwrite: Start anew, and replace a comparison that is there at the first result.
        tell: Called with every new result.

    Returns:
        The comparison, and its pictures.

    Raises:
        RunError, PermissionError: ``out`` cannot be used; found before any fit.
        TypeError, ValueError: A setting cannot be used; found before any fit.
        DataNotFoundError, CorruptDataError: The data are not there, or damaged.
    """
    config = _configure(settings)
    place = Path(out).expanduser().resolve()
    results = [] if overwrite else _unfinished(place, config)
    if not results:
        place = runs.check_place(out, overwrite=overwrite, files=_FILES)
    compare_methods.make_task(settings.data[-1], 0, settings.root)  # MNIST's files may be missing
    comparison = Comparison(config, results)
    done = {(row["data"], row["seed"], row["method"]) for row in results}
    current: tuple[str, int] | None = None
    try:
        for name, seed, method in settings.cells():
            if (name, seed, method) in done:
                continue
            if current != (name, seed):
                task, current = compare_methods.make_task(name, seed, settings.root), (name, seed)
            outcome = compare_methods.evaluate(method, name, task, seed, settings.device)
            row = {"data": name, "seed": seed, "method": method, **outcome._asdict()}
            del row["log_alpha"]
            with runs.uninterrupted():
                new = not results
                results.append(row)
                _write(comparison, place, new, _relevance(name, seed, outcome, task))
            tell(row)
    except KeyboardInterrupt:
        if not results:
            raise
        comparison = Comparison(config, results, interrupted=True)
    return comparison, draw(comparison, place)


def load(path: str | os.PathLike[str]) -> Comparison:
    """Read a comparison's folder.

    Raises:
        RunError: There is none, or it is damaged or of another version.
    """
    folder = Path(path).expanduser()
    config, summary = runs.read_json(folder / CONFIG), runs.read_json(folder / _SUMMARY)
    if config.pop("format", None) != _FORMAT or config.get("command") != COMMAND:
        raise RunError(f"{folder / CONFIG} is not a comparison that this version reads.")
    runs.require(config, ("settings", "versions", "methods"), folder / CONFIG)
    runs.require(config["settings"], ("data", "seeds"), folder / CONFIG)
    runs.require(summary, ("results",), folder / _SUMMARY)
    return Comparison(config, summary["results"])


def is_comparison(path: str | os.PathLike[str]) -> bool:
    """Whether a folder says of itself that it holds a comparison."""
    try:
        config = json.loads((Path(path).expanduser() / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("command") == COMMAND


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw the pictures into the folder, replacing those that are there."""
    pictures = []
    for name in comparison.config["settings"]["data"]:
        numbers, picture = folder / f"{name}.npz", folder / f"{name}.png"
        if not numbers.exists():
            continue
        with np.load(numbers) as found:
            figure = plot_dropout_rates(
                found["example"],
                int(found["label"]),
                found["log_alpha"],
                tuple(found["image_shape"].tolist()),
            )
        with replacing(picture) as unfinished:
            cast("Figure", figure).savefig(unfinished)
        pictures.append(picture)
    return pictures


def _configure(settings: Settings) -> dict[str, Any]:
    """The content of ``config.json``, after a check of every setting."""
    if not settings.data:
        raise ValueError(f"data must name at least one of {', '.join(METHODS)}.")
    for name in settings.data:
        if name not in METHODS:
            raise compare_methods.unknown_data(name)
    if len(set(settings.data)) < len(settings.data):
        raise ValueError(f"data must name each set once, but is {' '.join(settings.data)}.")
    check_count("seeds", settings.seeds)
    found = runs.environment(choose_device(settings.device))
    found["versions"]["scikit-learn"] = version("scikit-learn")  # its digits, and L1's folds
    methods = {name: {VDARD: VDARD_SETTINGS[name], L1: L1_SETTINGS[name]} for name in settings.data}
    config = {"command": COMMAND, "settings": asdict(settings), "methods": methods, **found}
    plain: dict[str, Any] = json.loads(json.dumps(config))  # as it is read back
    return plain


def _unfinished(place: Path, config: dict[str, Any]) -> list[Row]:
    """Results of an earlier run that can be continued; none if there is no such run."""
    if not is_comparison(place):
        return []
    earlier = load(place)
    same = all(earlier.config[key] == config[key] for key in ("settings", "methods", "versions"))
    return earlier.results if same and len(earlier.results) < earlier.num_cells else []


def _relevance(name: str, seed: int, outcome: Outcome, task: Task) -> dict[str, Any] | None:
    """What the picture is drawn from; of the first seed only."""
    if seed or outcome.log_alpha is None:
        return None
    return {
        f"{name}.npz": {
            "example": task.x_test[0],
            "label": task.y_test[0],
            "log_alpha": outcome.log_alpha,
            "image_shape": np.array(task.image_shape),
        }
    }


def _write(comparison: Comparison, place: Path, new: bool, arrays: dict[str, Any] | None) -> None:
    """Write all there is; a new folder appears whole, and the files of an old one one by one."""
    if not new:
        _write_files(comparison, place, arrays)
        return
    staging = beside(place)
    try:
        staging.mkdir(parents=True)
        _write_files(comparison, staging, arrays)
        write_json(staging / CONFIG, {"format": _FORMAT, **comparison.config})
        runs.move(staging, place)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_files(comparison: Comparison, folder: Path, arrays: dict[str, Any] | None) -> None:
    for file, content in (arrays or {}).items():
        with replacing(folder / file) as unfinished:
            np.savez(unfinished, **content)
    summary = comparison.summary()
    write_csv(folder / _RESULTS_CSV, comparison.results)
    write_csv(folder / _SUMMARY_CSV, summary)
    # Last, since it is what a later run continues from.
    write_json(folder / _SUMMARY, {"results": comparison.results, "summary": summary})


# The table.

_HEADINGS = ["data", "method", "accuracy %", "poster", "zero weights %", "poster", "log-loss", "s"]
_CAPTION = (
    "zero weights: all weights count, one per class and feature, intercepts do not; log-loss: "
    "nats per test point; s: seconds per fit, the choice of C included. VD-ARD's KL is weighted by "
    f"{VDARD_SETTINGS[DIGITS]['kl_weight']:g}, chosen on validation data."
)


def _summarise(name: str, method: str, rows: Sequence[Row]) -> Row:
    summary: Row = {"data": name, "method": method, "seeds": len(rows)}
    for key in ("accuracy", "sparsity", "log_loss", "nonzero", "seconds"):
        values = [float(row[key]) for row in rows]
        summary[f"{key}_mean"] = statistics.fmean(values)
        summary[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    accuracy, sparsity = POSTER[name, method]
    return summary | {"poster_accuracy": accuracy, "poster_sparsity": sparsity}


def _cells(row: Row) -> list[str]:
    def cell(key: str, digits: int) -> str:
        spread = row[f"{key}_sd"]
        mean = f"{row[f'{key}_mean']:.{digits}f}"
        return mean if spread is None else f"{mean} ± {spread:.{digits}f}"

    return [
        row["data"],
        row["method"],
        cell("accuracy", 1),
        f"{row['poster_accuracy']:.1f}",
        cell("sparsity", 1),
        f"{row['poster_sparsity']:.1f}",
        cell("log_loss", 3),
        f"{row['seconds_mean']:.1f}",
    ]
