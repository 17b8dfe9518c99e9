"""Processes that time a training step each, and take turns.

A process has one library, one network and one thread, on the core that all share, and gives its
processor time on a CPU, wall time on a GPU; or as many threads as are asked for, and wall time.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, environment, write_json
from resources import busy_seconds
from step_peers import PEERS, NotAvailableError, batch

SECONDS = 0.25
# Of products in float32 ("high" is TF32), and of those that autocast changes. Variances stay out of
# autocast, so that bf16 has two kinds of it.
PRECISIONS = {
    "fp32": ("highest", None),
    "TF32": ("high", None),
    "bf16": ("highest", torch.bfloat16),
    "bf16, else TF32": ("high", torch.bfloat16),
}


@dataclass(frozen=True)
class Case:
    """What is timed: a network at a batch size, and how."""

    network: str
    batch: int
    device: str
    precision: str = "fp32"
    threads: int | None = None

    @property
    def clock(self) -> tuple[Any, Any]:
        """What waits for all that is under way, and what tells the seconds."""
        if self.device == "cuda":
            return torch.cuda.synchronize, time.perf_counter
        return lambda: None, time.process_time if self.threads is None else time.perf_counter


def serve(pipe: Any, peer: str, case: Case) -> None:
    """A worker: builds its step, then times some whenever it is asked."""
    if case.threads is None and case.device == "cpu" and hasattr(os, "sched_setaffinity"):
        # All on one core: another would have other neighbours, and times a tenth apart.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(case.threads or 1)
    torch.set_flush_denormal(True)
    matmul_precision, dtype = PRECISIONS[case.precision]
    torch.set_float32_matmul_precision(matmul_precision)
    options = {} if dtype is None else {"dtype": dtype}
    device, (synchronize, clock) = case.device, case.clock
    torch.manual_seed(0)
    try:
        started = time.perf_counter()
        step = PEERS[peer](case.network, *batch(case.batch, device), **options)
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
            pipe.send(request.measure(case))
            continue
        count = 0
        busy, ours = busy_seconds(), time.process_time()
        started = now = clock()
        wall = time.perf_counter()
        while now - started < SECONDS and time.perf_counter() - wall < 20 * SECONDS:
            step()
            count += 1
            if count % 20 == 0 or device == "cpu":  # a GPU is never waited for, but for the clock
                synchronize()
                now = clock()
        synchronize()
        time_of_a_step = 1e3 * (clock() - started) / count
        others = (busy_seconds() - busy) - (time.process_time() - ours)
        pipe.send((time_of_a_step, others / (time.perf_counter() - wall)))


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

    def measure(self, case: Case) -> float:
        """Of the fastest of ten products, the first two aside."""
        synchronize, clock = case.clock
        left, right = (
            torch.randn(self.width, self.width, device=case.device, dtype=self.dtype)
            for _ in range(2)
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

    def __init__(self, peer: str, case: Case) -> None:
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(other, peer, case), daemon=True)
        self._process.start()
        other.close()
        self.prepared = self._answer()

    def time(self) -> tuple[float, float]:
        """Milliseconds of a step, and how many cores other work kept busy meanwhile."""
        self._pipe.send("time")
        milliseconds, others = self._answer()
        return milliseconds, others

    def ask(self, request: str | Limit) -> float:
        """Have it measure the memory of a step, or the machine's limit; NaN if that kills it."""
        self._pipe.send(request)
        answer = self._answer()
        return math.nan if isinstance(answer, dict) else float(answer)

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
def workers(peers: Any, case: Case) -> Any:
    """The peers that are there, and why the others are not."""
    made, missing = {}, {}
    try:
        for peer in peers:
            worker = Worker(peer, case)
            if "missing" in worker.prepared:
                missing[peer] = worker.prepared["missing"]
                worker.stop()
            else:
                made[peer] = worker
        yield made, missing
    finally:
        for worker in made.values():
            worker.stop()


def compare(peers: Any, case: Case, rounds: int, processes: int = 1) -> dict[str, Any]:
    """Times of each peer, round by round, and process by process."""
    times: dict[str, list[float]] = {}
    others = []
    for _ in range(processes):
        with workers(peers, case) as (there, missing):
            for _ in range(rounds):
                for peer, worker in there.items():
                    milliseconds, busy = worker.time()
                    times.setdefault(peer, []).append(milliseconds)
                    others.append(busy)
            memory = {peer: worker.ask("memory") for peer, worker in there.items()}
            prepared = {p: worker.prepared["preparation_seconds"] for p, worker in there.items()}
    return {
        "network": case.network,
        "batch": case.batch,
        "rounds": rounds,
        "processes": processes,
        "milliseconds": times,
        "median_milliseconds": {peer: statistics.median(values) for peer, values in times.items()},
        "least_milliseconds": {peer: min(values) for peer, values in times.items()},
        "cores_busy_with_other_work": statistics.mean(others) if others else math.nan,
        "peak_bytes_of_a_step": memory,
        "preparation_seconds": prepared,
        "missing": missing,
    }


def path_of(action: str, device: str) -> Path:
    """The results file."""
    return RESULTS / f"step_{action}_{device}.json"


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
