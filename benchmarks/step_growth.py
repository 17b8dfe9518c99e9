"""How a step grows with weights, batch, sites, zeros and particles, and predictions with draws.

Each curve has an exponent p, from a fit of `fixed + factor * size ** p` to the least times of all
its sizes, by least squares of the logarithms: what does not depend on the size does not flatten it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from step_peers import network as build
from step_peers import parts
from step_workers import Case, compare, path_of, save

ROUNDS = 5
STEPS = ("deterministic", "LinearSVDO", "ours, eager", "ours, compiled")
PARTICLES = ("ours, eager", "ours, eager, looped", "ours, compiled", "ours, compiled, looped")
DRAWS = ("predict", "predict, looped")


@dataclass(frozen=True)
class Curve:
    """Networks and batches, what their size is, and who is timed."""

    cases: list[tuple[str, int]]
    against: str
    peers: tuple[str, ...] = STEPS


WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (25, 50, 100, 200, 400, 800, 1600, 3200, 6400)
CURVES = {
    "width": Curve([(f"784-{width}-{width}-10", 100) for width in WIDTHS], "weights"),
    "batch": Curve([("784-300-100-10", size) for size in BATCHES], "batch"),
    "sites": Curve([(f"64x{count}", 100) for count in (4, 16, 64, 256)], "sites"),
    "zeros": Curve([(f"784-300-100-10@{s}", 100) for s in (0.1, 0.2, 0.5, 1.0)], "weights left"),
    "particles": Curve(
        [(f"784-300-100-10*{n}", 100) for n in (1, 2, 4, 8, 16)], "particles", PARTICLES
    ),
    "draws": Curve([(f"784-300-100-10*{n}", 1000) for n in (1, 10, 100, 1000)], "draws", DRAWS),
}  # fmt: skip


def run_growth(device: str, only: str | None) -> None:
    """All curves, or one of them again."""
    path = path_of("growth", device)
    curves: dict[str, Any] = {}
    if only is not None and path.exists():
        curves = json.loads(path.read_text())["curves"]
    for name, curve in CURVES.items():
        if only not in (None, name):
            continue
        rows = []
        for network, batch in curve.cases:
            result = compare(curve.peers, Case(network, batch, device), ROUNDS)
            rows.append({"size": size_of(curve.against, network, batch), **result})
            fits = {peer: fitted(rows, peer) for peer in curve.peers}
            curves[name] = {"against": curve.against, "rows": rows, "growth": fits}
            save(
                "growth", device, {"curves": {key: curves[key] for key in CURVES if key in curves}}
            )
            print(name, network, batch, result["median_milliseconds"], flush=True)


def size_of(quantity: str, network: str, batch: int) -> int:
    """What a curve is drawn against."""
    _, share, count = parts(network)
    weights = [p.numel() for p in build(network).parameters() if p.dim() > 1]
    return {
        "weights": sum(weights),
        "batch": batch,
        "sites": len(weights),
        "weights left": round(share**2 * sum(weights)),
        "particles": count,
        "draws": count,
    }[quantity]


def fitted(rows: list[dict[str, Any]], peer: str) -> dict[str, float] | None:
    """Exponent of the growth and its standard error, and the part that does not grow, in ms.

    None where there are fewer than four sizes, or the time hardly depends on them.
    """
    points = [(row["size"], row["least_milliseconds"].get(peer)) for row in rows]
    if len(points) < 4 or any(time is None for _, time in points):
        return None
    size, time = np.array(points, dtype=float).T
    if time.max() < 2 * time.min():
        return None
    scaled = size / size.max()

    def residuals(theta: Any) -> Any:
        return np.log(np.exp(theta[0]) + np.exp(theta[1]) * scaled ** theta[2]) - np.log(time)

    starts = [
        [math.log(share * time.min()), math.log(time.max()), p]
        for share in (0.9, 0.5, 0.01)
        for p in (0.8, 1.0, 1.2)
    ]
    best = min((least_squares(residuals, start) for start in starts), key=lambda fit: fit.cost)
    variance = 2 * best.cost / max(len(size) - 3, 1)
    covariance = variance * np.linalg.pinv(best.jac.T @ best.jac)
    return {
        "exponent": float(best.x[2]),
        "standard_error": float(np.sqrt(covariance[2, 2])),
        "fixed_milliseconds": float(np.exp(best.x[0])),
        "largest_deviation": float(np.abs(np.exp(-residuals(best.x)) - 1).max()),
    }
