"""A step of training on several processes of one machine: what the ranks cost each other.

    python benchmarks/step_devices.py [--devices 1 2] [--device cuda]

Each rank has one thread and batches of 100 of its own, so that an ideal machine takes as long for
any number of them. Wall times of `fit`, after a first epoch that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from environment import RESULTS, environment, write_json

NETWORKS = ("784-300-100-10", "784-1024-1024-10")
EPOCHS, STEPS, BATCH = 6, 50, 100


def measure(path: Path, device: str) -> None:
    """On one rank: milliseconds per step of every epoch but the first, written by rank 0."""
    import torch
    from step_peers import batch, network

    from bayes_svdo import BayesianNetwork, fit
    from bayes_svdo.inference.devices import is_first_rank
    from bayes_svdo.models import Categorical

    torch.set_num_threads(1)
    ranks, found = int(os.environ["WORLD_SIZE"]), {}
    x, y = batch(STEPS * BATCH * ranks, "cpu")
    for name in NETWORKS:
        torch.manual_seed(0)
        model = BayesianNetwork(network(name), Categorical(), len(x))
        posterior = fit(
            model, (x, y), epochs=EPOCHS, batch_size=BATCH, device=device, compile=True, seed=0,
            progress=False,
        )  # fmt: skip
        found[name] = [1e3 * row["seconds"] / STEPS for row in posterior.history][1:]
    if is_first_rank():
        path.write_text(json.dumps(found))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        measure(arguments.measure, arguments.device)
        return
    rows: list[dict[str, Any]] = []
    for count in arguments.devices:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "found.json")
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                str(count), __file__, "--device", arguments.device, "--measure", str(path),
            ]  # fmt: skip
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            found = json.loads(path.read_text())
        for name, times in found.items():
            rows.append(
                {"network": name, "ranks": count, "batch_per_rank": BATCH,
                 "milliseconds": times, "median": median(times), "least": min(times)}
            )  # fmt: skip
            print(rows[-1], flush=True)
    content = {
        "script": "benchmarks/step_devices.py",
        "seed": 0,
        "device": arguments.device,
        "environment": environment("lightning-fabric"),
        "rows": rows,
    }
    write_json(RESULTS / f"step_devices_{arguments.device}.json", content)


if __name__ == "__main__":
    main()
