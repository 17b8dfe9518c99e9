"""A step against threads, and how many `fit` would take."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from step_peers import batch
from step_peers import network as build
from step_workers import Case, compare, save

from bayes_svdo.inference.threads import threads_for

ROUNDS = 5
PEERS = ("ours, eager", "ours, compiled")
CASES = [
    *[(f"784-{width}-{width}-10", 100) for width in (16, 32, 64, 128, 256, 512, 1024)],
    *[("784-300-100-10", size) for size in (10, 25, 100, 400)],
    ("lenet-5-caffe", 20),
    ("lenet-5-caffe", 200),
]


def run_threads() -> None:
    """Wall times of one thread, of as many as there are cores, and of each power of two between."""
    cores = os.cpu_count() or 1
    numbers = sorted(
        {2**power for power in range(cores.bit_length())} & set(range(cores)) | {1, cores}
    )
    rows: list[dict[str, Any]] = []
    for network, size in CASES:
        found = {n: compare(PEERS, Case(network, size, "cpu", threads=n), ROUNDS) for n in numbers}
        rows.append(
            {
                "network": network,
                "batch": size,
                "least_milliseconds": {n: found[n]["least_milliseconds"] for n in numbers},
                "milliseconds": {n: found[n]["milliseconds"] for n in numbers},
                "cores_busy_with_other_work": found[1]["cores_busy_with_other_work"],
            }
        )
        save("threads", "cpu", {"threads": numbers, "rows": rows})
        print(network, size, rows[-1]["least_milliseconds"], flush=True)


def chosen(network: str, size: int, most: int) -> int:
    """How many of so many threads `fit` takes."""
    net, (x, _) = build(network), batch(size, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(most)
    try:
        return threads_for(partial(net, x))
    finally:
        torch.set_num_threads(before)
