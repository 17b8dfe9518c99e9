"""Processor time and memory of a function, measured in a process of its own."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from threadpoolctl import threadpool_limits


def one_thread() -> None:
    """For this process: torch's threads, and those of every BLAS that is loaded."""
    torch.set_num_threads(1)
    threadpool_limits(1)


def processor_ms(function: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of processor time that a call takes, and what it returns.

    Not wall time: on a shared machine that measures the neighbours.
    """
    started = time.process_time()
    result = function()
    return 1000 * (time.process_time() - started), result


def cost(prepare: Callable[..., Callable[[], Any]], repeats: int, *args: Any) -> dict[str, float]:
    """Median processor time of ``prepare(*args)()``, and the memory its first call needs.

    Args:
        prepare: A function of a module, that makes the data and returns what is to be measured.
        repeats: How often it is timed, after one call that is not.
        args: Passed to ``prepare``.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_cost, prepare, repeats, args).result()


def _cost(
    prepare: Callable[..., Callable[[], Any]], repeats: int, args: tuple[Any, ...]
) -> dict[str, float]:
    function = prepare(*args)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _peak_mib()
    function()
    memory = _peak_mib() - before
    return {"ms": median(processor_ms(function)[0] for _ in range(repeats)), "mib": memory}


def busy_seconds() -> float:
    """Seconds that all cores together have been busy since the machine started; NaN if unknown."""
    try:
        line = Path("/proc/stat").read_text().splitlines()[0]
    except OSError:
        return math.nan
    user, nice, system, _, _, irq, softirq, *_ = map(int, line.split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _peak_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM; memory is measured on Linux only.")
