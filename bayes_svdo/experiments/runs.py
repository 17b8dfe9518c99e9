"""Run folders: a fitted posterior with its settings, its numbers and its pictures.

====================  ================================================================
``config.json``       settings, data, versions and machine: what the run was
``posterior/``        the posterior, for ``Posterior.load``
``history.csv``       one row per epoch
``summary.json``      test error before and after pruning, sparsity per layer
``*.png``, ``*.gif``  pictures, drawn last and drawn again by ``bayes-svdo show``
====================  ================================================================

All but the pictures is written beside its place and moved there whole, so a folder is a complete
run or it is not there.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.table import Table

from bayes_svdo.experiments.files import beside, replacing, write_json
from bayes_svdo.inference import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure
    from rich.console import RenderableType

    from bayes_svdo.analysis.snapshots import Snapshots

FORMAT = 1
CONFIG, _POSTERIOR, _HISTORY, _SUMMARY = (
    "config.json",
    "posterior",
    "history.csv",
    "summary.json",
)
_TRAINING, _LOG_ALPHA, _WEIGHTS, _ANIMATION = (
    "training.png",
    "log_alpha.png",
    "weights.png",
    "sparsification.gif",
)
PICTURES = (_TRAINING, _LOG_ALPHA, _WEIGHTS, _ANIMATION)
_FILES = frozenset({CONFIG, _POSTERIOR, _HISTORY, _SUMMARY, *PICTURES})
_HEADINGS = {
    "weights": "weights",
    "error_percent": "error",
    "rmse": "RMSE",
    "nll": "NLL (nats per point)",
}
_CELLS = {"weights": "{:,}", "error_percent": "{:.2f} %", "nll": "{:.4f}"}
_PACKAGES = ("torch", "pyro-ppl", "lightning-fabric", "numpy")


class RunError(ValueError):
    """A run folder is missing or damaged, or its place is taken."""


@dataclass(frozen=True)
class Run:
    """A finished run, or one that Ctrl-C ended early.

    Attributes:
        posterior: The fitted posterior.
        config: What was run: ``settings``, ``data``, ``versions``, ``machine``.
        summary: What came out: ``test`` metrics ``before_pruning`` and ``after_pruning``,
            ``sparsity``, ``stopped_because``, ``interrupted``, ``epochs``, ``seconds``.
    """

    posterior: Posterior
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended training."""
        return bool(self.summary["interrupted"])

    def report(self) -> list[RenderableType]:
        """For a terminal: the table per layer, and the test metrics before and after pruning."""
        settings, summary = self.config["settings"], self.summary
        title = f"{settings['model']} on {settings['data']}, seed {settings['seed']}"
        parts: list[RenderableType] = [
            self.posterior.sparsity().to_rich(title=title),
            "",
            _errors(summary["test"]),
        ]
        if self.interrupted:
            parts += ["", f"Training was {summary['stopped_because']}."]
        return parts


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, as ``config.json`` records them."""
    return {
        "versions": {
            "bayes-svdo": version("bayes-svdo"),
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "machine": {
            "system": platform.platform(),
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": (
                torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            ),
        },
    }


def check_place(
    path: str | os.PathLike[str], *, overwrite: bool = False, files: Collection[str] = _FILES
) -> Path:
    """Refuse a place for a run folder before anything is spent on the run.

    Args:
        path: Where the folder is to be.
        overwrite: Whether a run folder that is there may be replaced. Nothing else ever is.
        files: What a run folder may hold.

    Returns:
        The absolute path.

    Raises:
        RunError: Something is there that may not be replaced.
        PermissionError: The folder cannot be written there.
    """
    place = Path(path).expanduser().resolve()
    if place == Path.cwd():
        raise RunError(f"--out {path} is the folder that you are in; name one inside it.")
    if place.exists() and not place.is_dir():
        raise RunError(f"--out {path} is a file; a run is written to a folder.")
    contents = sorted(item.name for item in place.iterdir()) if place.exists() else []
    if contents and not overwrite:
        raise RunError(
            f"--out {path} is not empty. Name another folder, or replace the run in it by "
            "--overwrite."
        )
    strange = [name for name in contents if name not in files]
    if strange or (contents and CONFIG not in contents):
        what = f"it holds {strange[0]}" if strange else f"it has no {CONFIG}"
        raise RunError(
            f"--out {path} is not a run folder, so it is not overwritten: {what}. "
            "Name another folder."
        )
    existing = next(folder for folder in (place.parent, *place.parents) if folder.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {path} cannot be written: no permission for {existing}.")
    return place


def save(run: Run, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write all of a run but its pictures; arguments, result and errors as :func:`check_place`.

    A run that is replaced stays until the new one is complete.
    """
    place = check_place(path, overwrite=overwrite)
    place.parent.mkdir(parents=True, exist_ok=True)
    staging = beside(place)
    try:
        staging.mkdir()
        run.posterior.save(staging / _POSTERIOR)
        run.posterior.history.to_csv(staging / _HISTORY)
        write_json(staging / _SUMMARY, run.summary)
        write_json(staging / CONFIG, {"format": FORMAT, **run.config})
        move(staging, place)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return place


def load(path: str | os.PathLike[str]) -> Run:
    """Read a run folder.

    Raises:
        RunError: There is none, or its JSON is damaged or of another version.
        CheckpointError: Its posterior is missing or damaged.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise RunError(f"{path} is not a folder. Name a folder that bayes-svdo fit wrote.")
    config, summary = read_json(folder / CONFIG), read_json(folder / _SUMMARY)
    if config.pop("format", None) != FORMAT:
        raise RunError(f"{folder / CONFIG} is not of the format {FORMAT} that this version reads.")
    require(config, ("settings", "data"), folder / CONFIG)
    require(config["settings"], ("model", "data", "seed"), folder / CONFIG)
    require(summary, ("test", "interrupted", "stopped_because"), folder / _SUMMARY)
    return Run(Posterior.load(folder / _POSTERIOR), config, summary)


def draw(run: Run, folder: Path, snapshots: Snapshots | None = None) -> list[Path]:
    """Draw the pictures of a run into its folder, replacing those that are there.

    Args:
        run: The run; one that was interrupted within its first epoch has no training curves.
        folder: The run's folder.
        snapshots: What an animation is drawn from; without, one that is there stays.

    Returns:
        The pictures in the folder, in the order of ``PICTURES``.
    """
    from bayes_svdo import analysis

    posterior = run.posterior
    image_shape = _image_shape(run)
    if len(posterior.history):
        _draw(folder / _TRAINING, lambda: analysis.plot_training(posterior.history))
    _draw(folder / _LOG_ALPHA, lambda: analysis.plot_log_alpha(posterior))
    _draw(
        folder / _WEIGHTS,
        lambda: analysis.plot_weights_before_after(posterior, image_shape=image_shape),
    )
    if snapshots is not None and len(snapshots):
        analysis.animate_sparsification(snapshots, folder / _ANIMATION, image_shape)
    return [folder / name for name in PICTURES if (folder / name).exists()]


def _image_shape(run: Run) -> tuple[int, ...] | None:
    """Shape of an input of the first layer; one row of pixels for inputs that are no image."""
    first = next(iter(run.posterior.log_alpha().values()))
    if first.dim() != 2:  # kernels have a shape of their own
        return None
    shape = tuple(run.config["data"]["inputs"])
    return shape if len(shape) == 3 else (1, math.prod(shape))


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C for the short while in which a run is put into its folder."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where Ctrl-C never arrives
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _errors(test: Mapping[str, Mapping[str, float | None]]) -> Table:
    """Test metrics before and after pruning."""
    table = Table()
    table.add_column("test set")
    metrics = list(test["after_pruning"])
    for metric in metrics:
        table.add_column(_HEADINGS.get(metric, metric), justify="right")
    for when in ("before_pruning", "after_pruning"):
        table.add_row(when.replace("_", " "), *(_cell(name, test[when][name]) for name in metrics))
    return table


def _cell(metric: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return _CELLS.get(metric, "{:.4g}").format(value)


def _draw(path: Path, plot: Callable[[], Figure | SubFigure]) -> None:
    """Write a picture; one that is there is replaced when the new one is complete."""
    with replacing(path) as unfinished:
        cast("Figure", plot()).savefig(unfinished)


def move(staging: Path, place: Path) -> None:
    """Give a complete folder its name; what had that name goes only then."""
    if not place.exists():
        staging.rename(place)
        return
    old = beside(place)
    place.rename(old)
    try:
        staging.rename(place)
    except BaseException:
        old.rename(place)
        raise
    shutil.rmtree(old)


def read_json(path: Path) -> dict[str, Any]:
    """An object from a run folder; RunError if it is missing or damaged."""
    if not path.is_file():
        raise RunError(f"{path.parent} is not a run folder: it has no {path.name}.")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: it holds no object.")
    return content


def require(content: Mapping[str, Any], keys: Iterable[str], path: Path) -> None:
    """RunError if a key is missing in what was read from ``path``."""
    missing = [key for key in keys if key not in content]
    if missing:
        raise RunError(f"{path} is damaged: it has no {missing[0]!r}.")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
