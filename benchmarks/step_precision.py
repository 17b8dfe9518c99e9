"""The large network in each precision, beside the limit of the machine.

Operations of a step's matrix products are counted from the layers' sizes, a multiply-add as two: a
layer of N weights at batch M has three products of 2MN (forward, gradient of the weights, gradient
of the inputs, which the first layer spares), and ours has each of them twice, for means and for
variances. The limit beside them is the best of some products of square matrices, in the same
precision and in a process of the same run.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from step_peers import network as build
from step_workers import PRECISIONS, Case, Limit, path_of, save, workers

ROUNDS = 10
PEERS = ("deterministic", "ours, eager", "ours, compiled")
# Network, batches, width of the limit's matrices.
CASES = ("4096x4", (100, 1000, 8192), 8192)
TRIAL = ("784-64-64-10", (32,), 256)


def run_precision(device: str, trial: Path | None) -> None:
    """The large network in each precision, and what share of the machine's limit it reaches."""
    network, sizes, width = CASES if trial is None else TRIAL
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
    with workers(PEERS, Case(network, size, device, precision)) as (there, missing):
        for _ in range(ROUNDS):
            for peer, worker in there.items():
                times.setdefault(peer, []).append(worker.time()[0])
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
