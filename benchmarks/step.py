"""One training step, ours beside the peers', and how it grows.

    python benchmarks/step.py peers [--device cuda]      # all libraries, three networks
    python benchmarks/step.py growth [--device cuda]     # against width, batch, number of sites
    python benchmarks/step.py precision [--device cuda]  # 4096x4 beside the limit of the machine
    python benchmarks/step.py profile                    # of the compiled step, on a CPU
    python benchmarks/step.py table [--device cuda]      # the results as Markdown

Each library has a process of its own, with one thread. They take turns, a few steps each, many
rounds over, so that what else the machine does falls on all of them alike; a ratio is taken within
a round. Processes of the same program differ by a tenth, by where their memory lies; so the cases
that targets are set for start each library several times over, all of them together. Times are
processor times of the process on a CPU, wall times on a GPU, in milliseconds.
`benchmarks/README.md` says how to install the peers; one that is missing is left out, and said.

`precision` counts the operations of a step's matrix products from the layers' sizes, a multiply-add
as two: a layer of N weights at batch M has three products of 2MN (forward, gradient of the weights,
gradient of the inputs, which the first layer spares), and ours has each of them twice, for means
and for variances. The limit beside them is the best of some products of square matrices, in the
same precision and in a process of the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from environment import RESULTS, environment, write_json
from step_peers import PEERS, NotAvailableError, batch
from step_peers import network as build
from step_report import ratio, table

ROUNDS, SECONDS = 10, 0.25
# Processes of each library, where there are targets; so many fewer rounds in each.
PROCESSES = 5
NETWORKS = ("784-300-100-10", "lenet-5-caffe", "4096x4")
BATCHES = (100, 1000)
EXTRA = (("lenet-5-caffe", 200),)
# 784-4096-4096-4096-10 is 36.8 million weights: a second a step for some, so fewer rounds.
FEWER = {"4096x4": 3}
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
GROWTH = {
    "width": ([(f"784-{w}-{w}-10", 100) for w in (64, 256, 1024, 2048, 4096, 8192)], "weights"),
    "batch": ([("784-300-100-10", b) for b in (25, 100, 400, 1600, 6400)], "batch"),
    "zeroed": ([(f"784-300-100-10@{share}", 100) for share in (1.0, 0.5, 0.2, 0.1)], "left"),
    "sites": ([(f"64x{n}", 100) for n in (4, 16, 64, 256)], "sites"),
}
GROWTH_PEERS = ("deterministic", "LinearSVDO", "ours, eager", "ours, compiled")
# Of products in float32 ("high" is TF32), and of those that autocast changes. Variances stay out of
# autocast, so that bf16 has two kinds of it.
PRECISIONS = {
    "fp32": ("highest", None),
    "TF32": ("high", None),
    "bf16": ("highest", torch.bfloat16),
    "bf16, else TF32": ("high", torch.bfloat16),
}
PRECISION_PEERS = ("deterministic", "ours, eager", "ours, compiled")
# Network, batches, width of the limit's matrices.
PRECISION_CASES = ("4096x4", (100, 1000, 8192), 8192)
PRECISION_TRIAL = ("784-64-64-10", (32,), 256)


def clock_of(device: str) -> tuple[Any, Any]:
    """What waits for all that is under way, and what tells the seconds."""
    if device == "cuda":
        return torch.cuda.synchronize, time.perf_counter
    return lambda: None, time.process_time


def serve(
    pipe: Any, peer: str, network: str, size: int, device: str, precision: str = "fp32"
) -> None:
    """A worker: builds its step, then times some whenever it is asked."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    matmul_precision, dtype = PRECISIONS[precision]
    torch.set_float32_matmul_precision(matmul_precision)
    options = {} if dtype is None else {"dtype": dtype}
    synchronize, clock = clock_of(device)
    torch.manual_seed(0)
    try:
        started = time.perf_counter()
        step = PEERS[peer](network, *batch(size, device), **options)
        for _ in range(3):  # compiled for a GPU: tried, recorded, replayed
            step()
        synchronize()
        pipe.send({"preparation_seconds": time.perf_counter() - started})
    except NotAvailableError as error:
        pipe.send({"missing": str(error)})
        return
    while (request := pipe.recv()) is not None:
        if request == "memory":
            pipe.send(peak_memory(step, device))
            continue
        if isinstance(request, Limit):
            pipe.send(request.measure(device))
            continue
        count = 0
        started = now = clock()
        wall = time.perf_counter()
        while now - started < SECONDS and time.perf_counter() - wall < 20 * SECONDS:
            step()
            count += 1
            if count % 20 == 0 or device == "cpu":  # a GPU is never waited for, but for the clock
                synchronize()
                now = clock()
        synchronize()
        pipe.send(1e3 * (clock() - started) / count)


def peak_memory(step: Any, device: str) -> float:
    """Most bytes that a step holds beyond what is there before it; NaN where torch cannot say.

    On a GPU all that the process has to reserve for a step, weights and Adam included: a recorded
    graph has memory of its own, which no step allocates.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_reserved())
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return float(most) if most else math.nan


@dataclass(frozen=True)
class Limit:
    """A question to a worker: operations per second of the products of square matrices."""

    width: int
    dtype: torch.dtype

    def measure(self, device: str) -> float:
        """Of the fastest of ten products, the first two aside."""
        synchronize, clock = clock_of(device)
        left, right = (
            torch.randn(self.width, self.width, device=device, dtype=self.dtype) for _ in range(2)
        )
        product = torch.empty_like(left)
        seconds = []
        for _ in range(12):
            synchronize()
            started = clock()
            torch.mm(left, right, out=product)
            synchronize()
            seconds.append(clock() - started)
        return 2 * self.width**3 / min(seconds[2:])


class Worker:
    """A peer in a process of its own."""

    def __init__(self, *arguments: Any) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, *arguments), daemon=True)
        self._process.start()
        other.close()
        self.prepared = self._answer()

    def ask(self, request: str | Limit) -> float:
        """Have it time some steps, or measure their memory, or the machine's limit."""
        self._pipe.send(request)
        return float(self._answer())

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            return {"missing": "its process died"}

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.join()


@contextmanager
def workers(peers: Any, *case: Any) -> Any:
    """The peers that are there, and why the others are not."""
    made, missing = {}, {}
    try:
        for peer in peers:
            worker = Worker(peer, *case)
            if "missing" in worker.prepared:
                missing[peer] = worker.prepared["missing"]
                worker.stop()
            else:
                made[peer] = worker
        yield made, missing
    finally:
        for worker in made.values():
            worker.stop()


def compare(
    peers: Any, network: str, size: int, device: str, rounds: int, processes: int = 1
) -> dict[str, Any]:
    """Times of each peer, round by round, and process by process."""
    times: dict[str, list[float]] = {}
    for _ in range(processes):
        with workers(peers, network, size, device) as (there, missing):
            for _ in range(rounds):
                for peer, worker in there.items():
                    times.setdefault(peer, []).append(worker.ask("time"))
            memory = {peer: worker.ask("memory") for peer, worker in there.items()}
            prepared = {p: worker.prepared["preparation_seconds"] for p, worker in there.items()}
    return {
        "network": network,
        "batch": size,
        "rounds": rounds,
        "processes": processes,
        "milliseconds": times,
        "median_milliseconds": {peer: statistics.median(values) for peer, values in times.items()},
        "least_milliseconds": {peer: min(values) for peer, values in times.items()},
        "peak_bytes_of_a_step": memory,
        "preparation_seconds": prepared,
        "missing": missing,
    }


def path_of(action: str, device: str) -> Any:
    """The results file."""
    return RESULTS / f"step_{action}_{device}.json"


def run_peers(device: str, only: tuple[str, int] | None) -> None:
    """All libraries on all networks, or again on one of them."""
    results: list[dict[str, Any]] = []
    if only is not None:
        results = json.loads(path_of("peers", device).read_text())["results"]
        results = [result for result in results if (result["network"], result["batch"]) != only]
    # Seconds a step: the large network has small batches only, on a CPU.
    large = NETWORKS[-1] if device == "cpu" else ""
    cases = [
        (network, size)
        for network in NETWORKS
        for size in BATCHES
        if (network, size) != (large, max(BATCHES))
    ]
    for network, size in [*cases, *EXTRA] if only is None else [only]:
        rounds, processes = FEWER.get(network, ROUNDS), 1
        if any((network, size) == target[:2] for target in TARGETS):
            rounds, processes = ROUNDS // 2, PROCESSES
        results.append(compare(PEERS, network, size, device, rounds, processes))
        save("peers", device, {"results": results, "targets": check_targets(results)})
        print(network, size, results[-1]["median_milliseconds"], results[-1]["missing"], flush=True)


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


def run_growth(device: str) -> None:
    """Step time against one size at a time, with the exponent of its growth."""
    curves: dict[str, Any] = {}
    for name, (cases, quantity) in GROWTH.items():
        rows = []
        for network, size in cases:
            result = compare(GROWTH_PEERS, network, size, device, rounds=3)
            rows.append({"size": size_of(quantity, network, size), **result})
            fits = {peer: exponent(rows, peer) for peer in result["milliseconds"]}
            curves[name] = {"against": quantity, "rows": rows, "exponents": fits}
            save("growth", device, {"curves": curves})
            print(name, network, size, result["median_milliseconds"], flush=True)


def size_of(quantity: str, network: str, size: int) -> int:
    """What a curve is drawn against."""
    share = float(network.partition("@")[2] or 1.0)
    weights = [p.numel() for p in build(network).parameters() if p.dim() > 1]
    left = round(share**2 * sum(weights))
    return {"weights": sum(weights), "batch": size, "sites": len(weights), "left": left}[quantity]


def exponent(rows: list[dict[str, Any]], peer: str) -> float:
    """Slope of log time against log size, between the two largest sizes."""
    points = [(row["size"], row["least_milliseconds"].get(peer)) for row in rows][-2:]
    if len(points) < 2 or None in (points[0][1], points[1][1]):
        return math.nan
    (a, s), (b, t) = points
    return math.log(t / s) / math.log(b / a)


def run_precision(device: str, trial: Path | None) -> None:
    """The large network in each precision, and what share of the machine's limit it reaches."""
    network, sizes, width = PRECISION_CASES if trial is None else PRECISION_TRIAL
    path = path_of("precision", device)
    if trial is not None:
        path = trial / path.name
    left_out = {}
    if device == "cpu":
        left_out = {name: "a CPU has no TF32" for name in PRECISIONS if "TF32" in name}
    elif torch.cuda.get_device_capability() < (8, 0):
        left_out = {name: "the card has none" for name in PRECISIONS if name != "fp32"}
    results: list[dict[str, Any]] = []
    for precision in [name for name in PRECISIONS if name not in left_out]:
        for size in sizes:
            results.append(precision_case(network, size, width, device, precision))
            save("precision", device, {"left_out": left_out, "results": results}, path)
            print(precision, network, size, results[-1]["peers"], flush=True)


def precision_case(
    network: str, size: int, width: int, device: str, precision: str
) -> dict[str, Any]:
    """Times of a step, and its operations beside the limit.

    Under autocast the products of our variances stay in float32. So there are two shares: of the
    limit in the precision, and of the limits that the products have, each in its own.
    """
    dtype = PRECISIONS[precision][1] or torch.float32
    times: dict[str, list[float]] = {}
    limit: dict[torch.dtype, float] = {}
    with workers(PRECISION_PEERS, network, size, device, precision) as (there, missing):
        for _ in range(ROUNDS):
            for peer, worker in there.items():
                times.setdefault(peer, []).append(worker.ask("time"))
        memory = {peer: worker.ask("memory") for peer, worker in there.items()}
        for kind in {dtype, torch.float32}:
            limit[kind] = there["deterministic"].ask(Limit(width, kind))
    peers = {}
    for peer, values in times.items():
        products = operations(network, size)
        variances = 0 if peer == "deterministic" else products
        seconds = statistics.median(values) / 1e3
        least = products / limit[dtype] + variances / limit[torch.float32]
        peers[peer] = {
            "median_milliseconds": 1e3 * seconds,
            "milliseconds": values,
            "operations": products + variances,
            "operations_per_second": (products + variances) / seconds,
            "share_of_limit": (products + variances) / seconds / limit[dtype],
            "share_of_limits_of_the_products": least / seconds,
            "peak_bytes": memory[peer],
        }
    return {
        "network": network,
        "batch": size,
        "precision": precision,
        "float32_matmul_precision": PRECISIONS[precision][0],
        "width_of_limit": width,
        "limit": limit[dtype],
        "limit_float32": limit[torch.float32],
        "peers": peers,
        "missing": missing,
    }


def operations(network: str, size: int) -> int:
    """Operations of the matrix products of a deterministic step of a dense network."""
    weights = [module.weight.numel() for module in build(network) if hasattr(module, "weight")]
    return 2 * size * (3 * sum(weights) - weights[0])


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


def save(action: str, device: str, content: dict[str, Any], path: Path | None = None) -> None:
    """Write a results file, with where it comes from."""
    head = {
        "script": "benchmarks/step.py",
        "seed": 0,
        "threads": 1,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "environment": environment("lightning-fabric"),
    }
    write_json(path or path_of(action, device), head | content)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("peers", "growth", "precision", "profile", "table"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--again", nargs=2, metavar=("NETWORK", "BATCH"), help="of peers, one case")
    parser.add_argument(
        "--trial", type=Path, metavar="FOLDER",
        help="of precision and table: a small network, with its results file in FOLDER",
    )  # fmt: skip
    arguments = parser.parse_args()
    device = arguments.device
    if arguments.action == "table":
        print(table(arguments.trial or RESULTS, device))
    elif arguments.action == "peers":
        network, size = arguments.again or ("", 0)
        run_peers(device, (network, int(size)) if network else None)
    elif arguments.action == "growth":
        run_growth(device)
    elif arguments.action == "precision":
        run_precision(device, arguments.trial)
    elif device == "cuda":
        parser.error("profile is of a step on a CPU")
    else:
        run_profile(device)


if __name__ == "__main__":
    main()
