"""How often NoiseCollapseWarning is right: VD-ARD regression with no fewer features than data.

    python benchmarks/noise_collapse.py    # writes results/noise_collapse.{json,md}

Standard normal features and weights, noise of standard deviation 1. The number of features that
matter is a share of the number of observations; their weights are scaled so that they explain as
much variance as `SIGNALS` says. "Collapsed" is a fit whose noise has less than half the true
standard deviation. A false alarm is a warning where it has not, a miss no warning where it has;
fits that are refused as degenerate are counted apart.
"""

from __future__ import annotations

import argparse
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import RESULTS, environment, write_json
from tqdm import tqdm

from bayes_svdo.inference import (
    DegenerateObjectiveError,
    NoiseCollapseWarning,
    fit_vdard_regression,
)

NUM_DATA = (40, 80)
RATIOS = (1.0, 1.2, 1.5, 2.0, 5.0)
SHARES = (0.0, 0.05, 0.15, 0.3, 0.6)
SIGNALS = (1.0, 10.0)
WEIGHTS: tuple[float | str, ...] = (1.05, 1.3, 1.7, 2.0, 3.0, "bic")
KLS = ("exact", "empirical_bayes")
SEEDS = 3
COLLAPSED = 0.5
CONDITIONS = {
    "num": "observations",
    "ratio": "features / observations",
    "kl_weight": "kl_weight",
    "share": "relevant / observations",
}


def run(num: int, ratio: float, share: float, signal: float, seed: int) -> list[dict[str, Any]]:
    """One design, fitted with every KL and weight."""
    dim, relevant = round(num * ratio), round(num * share)
    rng = np.random.default_rng((seed, num, dim, relevant, round(signal)))
    x = rng.standard_normal((num, dim))
    weights = np.zeros(dim)
    weights[:relevant] = rng.standard_normal(relevant)
    weights *= math.sqrt(signal) / max(float(np.linalg.norm(weights)), 1e-9)
    y = x @ weights + rng.standard_normal(num)
    design = {"num": num, "ratio": ratio, "share": share, "signal": signal, "seed": seed}
    return [
        design | {"kl": kl, "kl_weight": weight} | outcome(x, y, kl, weight)
        for kl, weight in itertools.product(KLS, WEIGHTS)
    ]


def outcome(x: Any, y: Any, kl: str, weight: float | str) -> dict[str, Any]:
    """The noise that was found, as a multiple of the true one, and whether there was a warning."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            found = fit_vdard_regression(
                torch.from_numpy(x),
                torch.from_numpy(y),
                kl=kl,  # type: ignore[arg-type]
                kl_weight=weight,
            )
        except DegenerateObjectiveError:
            return {"refused": True}
    return {
        "refused": False,
        "noise": float(found.beta) ** -0.5,
        "warned": any(issubclass(w.category, NoiseCollapseWarning) for w in seen),
    }


def counts(runs: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Of each KL and each value of one condition, how many fits were what."""
    rows = []
    for kl, value in itertools.product(KLS, dict.fromkeys(r[key] for r in runs)):
        mine = [r for r in runs if r["kl"] == kl and r[key] == value]
        fitted = [r for r in mine if not r["refused"]]
        collapsed = [r["warned"] for r in fitted if r["noise"] < COLLAPSED]
        others = [r["warned"] for r in fitted if r["noise"] >= COLLAPSED]
        rows.append(
            {
                "kl": kl,
                key: value,
                "fits": len(mine),
                "refused": len(mine) - len(fitted),
                "collapsed": len(collapsed),
                "missed": len(collapsed) - sum(collapsed),
                "not_collapsed": len(others),
                "false_alarms": sum(others),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], key: str) -> list[str]:
    """False alarms and misses, as Markdown."""
    lines = [
        f"| KL | {CONDITIONS[key]} | fits | refused | collapsed | of these missed | not collapsed "
        "| of these false alarms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['kl']} | {row[key]} | {row['fits']} | {row['refused']} | {row['collapsed']} "
        f"| {percent(row['missed'], row['collapsed'])} | {row['not_collapsed']} "
        f"| {percent(row['false_alarms'], row['not_collapsed'])} |"
        for row in rows
    ]
    return [*lines, ""]


def percent(part: int, whole: int) -> str:
    """``part`` of ``whole``."""
    return f"{100 * part / whole:.0f} %" if whole else ""


def main() -> None:
    """Run all designs, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "noise_collapse.json")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    designs = list(itertools.product(NUM_DATA, RATIOS, SHARES, SIGNALS, range(SEEDS)))
    runs = [fitted for design in tqdm(designs) for fitted in run(*design)]
    found = {key: counts(runs, key) for key in CONDITIONS}
    content = {"script": "benchmarks/noise_collapse.py", "collapsed_below": COLLAPSED}
    write_json(out, content | {"environment": environment("scipy"), "counts": found})
    lines = [line for key, rows in found.items() for line in table(rows, key)]
    out.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
