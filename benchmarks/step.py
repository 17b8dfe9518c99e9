"""One training step, ours beside the peers', and how it grows.

    python benchmarks/step.py peers [--device cuda]      # all libraries, three networks
    python benchmarks/step.py growth [--device cuda]     # against width, batch, number of sites ...
    python benchmarks/step.py threads                    # against threads, and what `fit` chooses
    python benchmarks/step.py precision [--device cuda]  # 4096x4 beside the limit of the machine
    python benchmarks/step.py profile                    # of the compiled step, on a CPU
    python benchmarks/step.py table [--device cuda]      # writes results/step.md from their files

Each library has a process of its own, with one thread. They take turns, a few steps each, many
rounds over, so that what else the machine does falls on all of them alike; a ratio is taken within
a round. Processes of the same program differ by a tenth, by where their memory lies; so the cases
that targets are set for start each library several times over, all of them together. Times are
processor times of the process on a CPU, wall times on a GPU, in milliseconds.
`benchmarks/README.md` says how to install the peers; one that is missing is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from environment import RESULTS
from step_growth import CURVES, run_growth
from step_peers import LIBRARIES, PEERS, batch
from step_precision import run_precision
from step_report import ratio, write_table
from step_threads import run_threads
from step_workers import Case, compare, path_of, save

ROUNDS = 10
# Processes of each library, where there are targets; so many fewer rounds in each.
PROCESSES = 5
NETWORKS = ("784-300-100-10", "lenet-5-caffe", "4096x4")
BATCHES = (100, 1000)
EXTRA = (("lenet-5-caffe", 200),)
# 784-4096-4096-4096-10 is 36.8 million weights: seconds a step for some, so fewer rounds. A process
# takes 2 GB and more, so that at the largest batch not all are there at once: two groups, each with
# the nets that ratios are of.
FEWER = {"4096x4": 3}
CROWDED = ("4096x4", 1000)
GROUPS = (
    ("deterministic", "LinearSVDO", "TyXe", "Pyro", "ours, eager", "ours, compiled"),
    ("deterministic", "LinearSVDO", "cplxmodule", "pytorch-ard", "NumPyro", "ours, compiled"),
)
TARGETS = [
    ("784-300-100-10", 100, "ours, compiled", "LinearSVDO", 0.5),
    ("784-300-100-10", 100, "ours, compiled", "TyXe", 0.3),
    ("784-300-100-10", 100, "ours, compiled", "Pyro", 0.3),
    ("784-300-100-10", 100, "ours, compiled", "deterministic", 2.5),
    ("784-300-100-10", 100, "ours, eager", "LinearSVDO", 1.05),
    ("784-300-100-10", 100, "ours, compiled", "deterministic, plain Adam", 2.5),
    ("784-300-100-10", 100, "ours, eager", "LinearSVDO, plain Adam", 1.05),
    ("lenet-5-caffe", 200, "ours, compiled", "deterministic", 2.3),
    ("lenet-5-caffe", 200, "ours, compiled", "ours, eager", 1.0),
]


def run_peers(device: str, only: tuple[str, int] | None, more: bool) -> None:
    """All libraries on all networks, or again on one of them; in place of what was, or on top."""
    results: list[dict[str, Any]] = []
    before: list[dict[str, Any]] = []
    if only is not None:
        done = json.loads(path_of("peers", device).read_text())["results"]
        results = [result for result in done if (result["network"], result["batch"]) != only]
        before = [result for result in done if result not in results and more]
    cases = [(network, size) for network in NETWORKS for size in BATCHES]
    for network, size in [*cases, *EXTRA] if only is None else [only]:
        rounds, processes = FEWER.get(network, ROUNDS), 1
        if any((network, size) == target[:2] for target in TARGETS):
            rounds, processes = ROUNDS // 2, PROCESSES
        crowded = device == "cpu" and (network, size) == CROWDED
        for peers in GROUPS if crowded else (LIBRARIES,):
            found = compare(peers, Case(network, size, device), rounds, processes)
            there = found["milliseconds"].keys()
            same = [result for result in before if result["milliseconds"].keys() == there]
            results.append(joined(same[0], found) if same else found)
            save("peers", device, {"results": results, "targets": check_targets(results)})
            print(network, size, found["median_milliseconds"], found["missing"], flush=True)


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two measurements of one case, each of several processes, as one."""
    times = {
        peer: values + other["milliseconds"][peer] for peer, values in one["milliseconds"].items()
    }
    return other | {
        "processes": one["processes"] + other["processes"],
        "milliseconds": times,
        "median_milliseconds": {peer: median(values) for peer, values in times.items()},
        "least_milliseconds": {peer: min(values) for peer, values in times.items()},
        "cores_busy_with_other_work": (
            one["cores_busy_with_other_work"] * one["processes"]
            + other["cores_busy_with_other_work"] * other["processes"]
        )
        / (one["processes"] + other["processes"]),
    }


def check_targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at, and what was found."""
    found = []
    for network, size, one, other, most in TARGETS:
        for result in results:
            times = result["milliseconds"]
            if (result["network"], result["batch"]) == (network, size) and {one, other} <= set(
                times
            ):
                middle, low, high = ratio(result, one, other)
                found.append(
                    {"network": network, "batch": size, "of": one, "over": other, "at_most": most,
                     "ratio": middle, "quartiles": [low, high], "met": middle <= most}
                )  # fmt: skip
    return found


def run_profile(device: str) -> None:
    """Operations of the compiled step, by their share."""
    import torch._inductor.config as inductor
    from torch.profiler import ProfilerActivity, profile

    inductor.cpp.enable_kernel_profile = True
    steps = 50
    step = PEERS["ours, compiled"]("784-300-100-10", *batch(100, device))
    for _ in range(5):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    rows = [
        {"operation": event.key, "milliseconds": event.self_cpu_time_total / 1e3 / steps,
         "calls": event.count / steps}
        for event in events[:25]
    ]  # fmt: skip
    save("profile", device, {"network": "784-300-100-10", "batch": 100, "operations": rows})
    for row in rows:
        print(f"{row['milliseconds']:8.3f} ms  {row['calls']:5.1f}  {row['operation'][:90]}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = ("peers", "growth", "threads", "precision", "profile", "table")
    parser.add_argument("action", choices=actions)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--again", nargs=2, metavar=("NETWORK", "BATCH"), help="of peers, one case")
    parser.add_argument("--more", action="store_true", help="with --again: as further processes")
    parser.add_argument("--curve", choices=CURVES, help="of growth, one of them again")
    parser.add_argument(
        "--trial", type=Path, metavar="FOLDER",
        help="of precision and table: a small network, with its results file in FOLDER",
    )  # fmt: skip
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.action in ("threads", "profile") and device == "cuda":
        parser.error(f"{arguments.action} is of a step on a CPU")
    if arguments.action == "table":
        write_table(arguments.trial or RESULTS, device)
    elif arguments.action == "peers":
        network, size = arguments.again or ("", 0)
        run_peers(device, (network, int(size)) if network else None, arguments.more)
    elif arguments.action == "growth":
        run_growth(device, arguments.curve)
    elif arguments.action == "threads":
        run_threads()
    elif arguments.action == "precision":
        run_precision(device, arguments.trial)
    else:
        run_profile(device)


if __name__ == "__main__":
    main()
