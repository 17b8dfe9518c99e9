"""One training step, ours beside the peers', and how it grows.

    python benchmarks/step.py peers [--device cuda]     # all libraries, three networks, two batches
    python benchmarks/step.py growth [--device cuda]    # against width, batch, number of sites
    python benchmarks/step.py profile                   # where the compiled step's time goes
    python benchmarks/step.py table                     # the results as Markdown

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
import math
import os
import statistics
import time
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from environment import RESULTS, environment, write_json
from step_peers import PEERS, NotAvailableError, batch

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


def serve(pipe: Any, peer: str, network: str, size: int, device: str) -> None:
    """A worker: builds its step, then times some whenever it is asked."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    clock = time.perf_counter if device == "cuda" else time.process_time
    torch.manual_seed(0)
    try:
        started = time.perf_counter()
        step = PEERS[peer](network, *batch(size, device))
        step()
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
        count = 0
        started = now = clock()
        wall = time.perf_counter()
        while now - started < SECONDS and time.perf_counter() - wall < 20 * SECONDS:
            step()
            count += 1
            if count % 5 == 0 or device == "cpu":
                synchronize()
                now = clock()
        synchronize()
        pipe.send(1e3 * (clock() - started) / count)


def peak_memory(step: Any, device: str) -> float:
    """Most bytes that a step holds beyond what is there before it; NaN where torch cannot say."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return float(most) if most else math.nan


class Worker:
    """A peer in a process of its own."""

    def __init__(self, *arguments: Any) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, *arguments), daemon=True)
        self._process.start()
        other.close()
        self.prepared = self._answer()

    def ask(self, request: str) -> float:
        """Have it time some steps, or measure their memory."""
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
def workers(peers: Any, network: str, size: int, device: str) -> Any:
    """The peers that are there, and why the others are not."""
    made, missing = {}, {}
    try:
        for peer in peers:
            worker = Worker(peer, network, size, device)
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


def ratio(result: dict[str, Any], one: str, other: str) -> tuple[float, float, float]:
    """Median of one peer's time over another's, and its quartiles.

    Over rounds; where there were several processes, over theirs, each with the median of its
    rounds.
    """
    times = result["milliseconds"]
    values = [a / b for a, b in zip(times[one], times[other], strict=True)]
    if result["processes"] > 1:
        rounds = result["rounds"]
        values = [statistics.median(values[i : i + rounds]) for i in range(0, len(values), rounds)]
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return middle, low, high


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
    from step_peers import network as build

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


def save(action: str, device: str, content: dict[str, Any]) -> None:
    """Write a results file, with where it comes from."""
    head = {
        "script": "benchmarks/step.py",
        "seed": 0,
        "threads": 1,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "environment": environment("lightning-fabric"),
    }
    write_json(path_of(action, device), head | content)


def table(device: str) -> str:
    """What the results files hold."""
    lines = []
    if path_of("peers", device).exists():
        content = json.loads(path_of("peers", device).read_text())
        for result in content["results"]:
            there = result["median_milliseconds"]
            rounds = f"{result['rounds']} rounds"
            if result["processes"] > 1:
                rounds += f" in each of {result['processes']} processes"
            lines += [
                f"\n**{result['network']}, batch {result['batch']}**, {rounds}\n",
                "| | ms, median | least | x deterministic | x LinearSVDO | MB of a step |",
                "| --- | --- | --- | --- | --- | --- |",
            ]
            for peer, value in there.items():
                ratios = [
                    f"{ratio(result, peer, base)[0]:.2f}" if base in there else "-"
                    for base in ("deterministic", "LinearSVDO")
                ]
                memory = result["peak_bytes_of_a_step"][peer]
                lines.append(
                    f"| {peer} | {value:.2f} | {result['least_milliseconds'][peer]:.2f} "
                    f"| {' | '.join(ratios)} | {'-' if memory is None else f'{memory / 1e6:.1f}'} |"
                )
            lines += [f"\n{peer}: {why}" for peer, why in result["missing"].items()]
        lines += ["\n| target | at most | found (quartiles) |", "| --- | --- | --- |"]
        for row in content["targets"]:
            low, high = row["quartiles"]
            lines.append(
                f"| {row['network']}, batch {row['batch']}: {row['of']} / {row['over']} "
                f"| {row['at_most']} | {row['ratio']:.2f} ({low:.2f} to {high:.2f})"
                f"{'' if row['met'] else ', missed'} |"
            )
    if path_of("growth", device).exists():
        content = json.loads(path_of("growth", device).read_text())
        for name, curve in content["curves"].items():
            peers = curve["exponents"]
            lines += [
                f"\n**Against {name}**, least ms of {curve['rows'][0]['rounds']} rounds\n",
                f"| {curve['against']} | {' | '.join(peers)} |",
                f"| --- |{' --- |' * len(peers)}",
            ]
            for row in curve["rows"]:
                values = [f"{row['least_milliseconds'][peer]:.2f}" for peer in peers]
                lines.append(f"| {row['size']:,} | {' | '.join(values)} |")
            fits = [f"{value:.2f}" for value in peers.values()]
            lines.append(f"| exponent at the end | {' | '.join(fits)} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("peers", "growth", "profile", "table"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--again", nargs=2, metavar=("NETWORK", "BATCH"), help="of peers, one case")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table(arguments.device))
        return
    if arguments.action == "peers":
        network, size = arguments.again or ("", 0)
        run_peers(arguments.device, (network, int(size)) if network else None)
    else:
        {"growth": run_growth, "profile": run_profile}[arguments.action](arguments.device)


if __name__ == "__main__":
    main()
