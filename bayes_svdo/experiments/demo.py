"""The README's main job: LeNet-300-100 learns scikit-learn's digits and prunes itself."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from bayes_svdo import data
from bayes_svdo.experiments.runs import Run
from bayes_svdo.experiments.training import Settings, evaluate, make_task, run, train

# Of the candidates of benchmarks/demo_settings.py the one with the lowest validation error; of two
# that are equal, the shorter.
SETTINGS = Settings(model="lenet-300-100", data="digits", epochs=100, batch_size=50, lr=1e-2)
# A fifth of the training set.
_NUM_VALIDATION = 287


def demo(
    out: str | os.PathLike[str] = "demo", seed: int = 0, *, overwrite: bool = False
) -> tuple[Run, list[Path]]:
    """Train ``SETTINGS``, evaluate on the test set once, and draw everything, animation included.

    Args:
        out: The run folder. An earlier demo in it is replaced.
        seed: Of initial weights, shuffling and noise.
        overwrite: Replace any run in ``out``.

    Returns:
        The run, and its pictures.

    Raises:
        RunError, PermissionError: ``out`` cannot be used.
    """
    done = run(
        replace(SETTINGS, seed=seed, devices=1),
        out,
        command="demo",
        overwrite=overwrite or _holds_a_demo(Path(out)),
        animation=True,
    )
    return cast("tuple[Run, list[Path]]", done)  # None in other processes, of which there are none


def validate(settings: Settings = SETTINGS, splits: Sequence[int] = (0, 1, 2)) -> dict[str, float]:
    """How good settings are, on parts held out of the training set.

    Args:
        settings: What to train.
        splits: Seeds of the divisions of the training set.

    Returns:
        ``error_percent`` after pruning on the held-out part, and ``compression``: means over the
        splits.
    """
    dataset = data.load(settings.data, settings.root)
    errors, compressions = [], []
    for split in splits:
        task = make_task(dataset.with_validation_split(_NUM_VALIDATION, split))
        posterior = train(settings, task)
        errors.append(evaluate(posterior, task)["after_pruning"]["error_percent"])
        compressions.append(posterior.sparsity().compression)
    return {
        "error_percent": statistics.mean(errors),
        "compression": statistics.mean(compressions),
    }


def _holds_a_demo(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("command") == "demo"
