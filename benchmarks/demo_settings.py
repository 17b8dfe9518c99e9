"""Settings of the demo, compared on parts held out of the training set of digits.

    python benchmarks/demo_settings.py    # writes results/demo_settings.json

The test set is not read. Three divisions of the training set, one fifth held out.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from environment import RESULTS, environment, write_json

from bayes_svdo.experiments.demo import SETTINGS, validate

CANDIDATES = [
    {"lr": lr, "epochs": epochs, "batch_size": batch_size}
    for lr in (5e-3, 1e-2)
    for epochs in (100, 150)
    for batch_size in (50, 100)
]


def main() -> None:
    """Write the results as they come."""
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    for change in CANDIDATES:
        rows.append({**change, **validate(replace(SETTINGS, **change))})
        print(rows[-1], flush=True)
        write_json(
            RESULTS / "demo_settings.json",
            {
                "script": "benchmarks/demo_settings.py",
                "settings": asdict(SETTINGS),
                "environment": environment(),
                "candidates": rows,
            },
        )


if __name__ == "__main__":
    main()
