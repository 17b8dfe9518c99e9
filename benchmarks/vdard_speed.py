"""Speed of exact linear VD-ARD beside scikit-learn's ARDRegression, in one run.

    python benchmarks/vdard_speed.py            # writes results/vdard_speed.{json,md,png}
    python benchmarks/vdard_speed.py --repeat   # n = 500 once more, in a process of its own

Standard normal features, ten of which matter, noise of 0.3. For each seed the programs fit the same
data, one after the other in an order drawn for the seed, on one thread; times are processor seconds
of the fit (`time.process_time`), medians over seeds, and ratios are medians of those within a seed.
With no fewer features than data the objective has no maximum at kl_weight 1: there it is left out.
The error is that of the coefficients, root mean square. ARDRegression sets a coefficient to 0 only
where its precision exceeds 1e4, so its count says little.
VD-ARD is `fit_vdard_regression`; `VDARDRegressor`, like ARDRegression, also checks its input as
scikit-learn does. "Eight at once" are eight problems in one call, time per problem.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from environment import ARD_CAVEAT, RESULTS, environment, write_json
from numpy.typing import NDArray
from resources import cost, one_thread, processor_ms
from sklearn.linear_model import ARDRegression

from bayes_svdo.inference import VDARDRegressor
from bayes_svdo.inference.exact_regression import fit_vdard_regression

Array = NDArray[np.float64]
NUM_RELEVANT = 10
NOISE = 0.3
SIZES = ((500, 100), (200, 1000))
SEEDS = 15
AT_ONCE = 8
WEIGHTS: dict[str, float | str] = {
    "VD-ARD, kl_weight 1": 1.0,
    "VD-ARD, kl_weight 2 (AIC)": "aic",
    "VD-ARD, kl_weight log N (BIC)": "bic",
}
ESTIMATOR = "VDARDRegressor, kl_weight 1"
EIGHT = "VD-ARD (BIC), eight at once"
GROWTH_N = ((200, 100), (1000, 100), (5000, 100), (20_000, 100), (100_000, 100))
GROWTH_P = ((200, 50), (200, 200), (200, 1000), (200, 5000), (200, 20_000))
MOST_FEATURES_ARD = 5000
# What a process has freed before it may take again unseen.
LEAST_SEEN = 1.0


def draw(n: int, p: int, seed: int) -> tuple[Array, Array, Array]:
    """Inputs (n, p), targets (n,) and weights (p,)."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((n, p))
    weights = np.zeros(p)
    weights[:NUM_RELEVANT] = generator.standard_normal(NUM_RELEVANT)
    return x, x @ weights + NOISE * generator.standard_normal(n), weights


def vdard(x: Array, y: Array, kl_weight: float | str) -> Array:
    """Coefficients of VD-ARD."""
    found = fit_vdard_regression(torch.from_numpy(x), torch.from_numpy(y), kl_weight=kl_weight)
    coefficients: Array = found.loc.numpy()
    return coefficients


def ard(x: Array, y: Array) -> Array:
    """Coefficients of ARDRegression, as it comes."""
    coefficients: Array = ARDRegression().fit(x, y).coef_
    return coefficients


def compare(sizes: Sequence[tuple[int, int]] = SIZES) -> list[dict[str, Any]]:
    """Every program on every size and seed."""
    runs = []
    for n, p in sizes:
        programs: dict[str, Callable[[Array, Array], Array]] = {"ARDRegression": ard}
        for name, weight in WEIGHTS.items():
            if p < n - 1 or weight != 1.0:
                programs[name] = lambda x, y, weight=weight: vdard(x, y, weight)
                if weight == 1.0:
                    programs[ESTIMATOR] = lambda x, y: VDARDRegressor().fit(x, y).coef_
        for fit in programs.values():
            fit(*draw(60, 20, 0)[:2])  # what is paid once only: imports, tables
        for seed in range(SEEDS):
            x, y, weights = draw(n, p, seed)
            # Drawn, as each finds the caches as the one before has left them.
            for name in random.Random(seed).sample(list(programs), len(programs)):
                ms, found = processor_ms(lambda f=programs[name], a=x, b=y: f(a, b))
                runs.append(
                    {"n": n, "p": p, "program": name, "seed": seed, "ms": ms}
                    | {
                        "nonzero": int(np.count_nonzero(found)),
                        "error": float(np.sqrt(np.mean((found - weights) ** 2))),
                    }
                )
            runs.append(_at_once(n, p, seed))
        print(f"n = {n}, p = {p} done", flush=True)
    return runs


def _at_once(n: int, p: int, seed: int) -> dict[str, Any]:
    drawn = [draw(n, p, AT_ONCE * seed + i) for i in range(AT_ONCE)]
    x, y, weights = (np.stack(part) for part in zip(*drawn, strict=True))
    ms, found = processor_ms(lambda: vdard(x, y, "bic"))
    return {
        "n": n, "p": p, "program": EIGHT, "seed": seed, "ms": ms / AT_ONCE,
        "nonzero": float(np.count_nonzero(found)) / AT_ONCE,
        "error": float(np.sqrt(np.mean((found - weights) ** 2))),
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> str:
    """Medians and ratios, as Markdown."""
    lines = [
        "| n | p | program | ms | time, x ARDRegression | nonzero | error of coefficients |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for n, p in SIZES:
        of_size = [r for r in runs if (r["n"], r["p"]) == (n, p)]
        theirs = {r["seed"]: r["ms"] for r in of_size if r["program"] == "ARDRegression"}
        names = {r["program"] for r in of_size}
        for name in [n for n in ("ARDRegression", *WEIGHTS, ESTIMATOR, EIGHT) if n in names]:
            mine = [r for r in of_size if r["program"] == name]
            ratio = median(r["ms"] / theirs[r["seed"]] for r in mine)
            lines.append(
                f"| {n} | {p} | {name} | {median(r['ms'] for r in mine):.1f} | {ratio:.2f} "
                f"| {mean(r['nonzero'] for r in mine):.1f} "
                f"| {math.sqrt(mean(r['error'] ** 2 for r in mine)):.4f} |"
            )
    return "\n".join([*lines, "", ARD_CAVEAT, ""])


def repeat(path: Path) -> None:
    """Measure the smaller size again, and keep its ratios beside those of earlier processes."""
    done = json.loads(path.read_text())["processes"] if path.exists() else []
    done.append(ratios(compare(SIZES[:1])))
    write_json(path, {"environment": environment("scipy"), "processes": done})


def ratios(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of each program on the smaller size, the median over seeds of its time over theirs."""
    of_size = [r for r in runs if (r["n"], r["p"]) == SIZES[0]]
    theirs = {r["seed"]: r["ms"] for r in of_size if r["program"] == "ARDRegression"}
    return {
        name: median(r["ms"] / theirs[r["seed"]] for r in of_size if r["program"] == name)
        for name in (*WEIGHTS, ESTIMATOR)
    }


def repeats(path: Path, runs: list[dict[str, Any]]) -> str:
    """The ratios of all processes, that of the runs among them, as a table."""
    if not path.exists():
        return ""
    done = [ratios(runs), *json.loads(path.read_text())["processes"]]
    n, p = SIZES[0]
    lines = [
        f"\nn = {n}, p = {p} in {len(done)} processes, that above among them, time, "
        "x ARDRegression:\n",
        "| program | median | least | largest |",
        "| --- | --- | --- | --- |",
    ]
    for name in done[0]:
        found = [each[name] for each in done]
        lines.append(f"| {name} | {median(found):.2f} | {min(found):.2f} | {max(found):.2f} |")
    return "\n".join([*lines, ""])


def prepare(program: str, n: int, p: int) -> Callable[[], Any]:
    """A fit whose cost is to be measured."""
    one_thread()
    x, y, _ = draw(n, p, 0)
    if program == "ARDRegression":
        return lambda: ard(x, y)
    vdard(*draw(60, 20, 0)[:2], "bic")  # the tables
    return lambda: vdard(x, y, "bic")


def growth() -> list[dict[str, Any]]:
    """Time and memory against n and against p."""
    return [
        {"axis": axis, "series": program, "n": n, "p": p} | cost(prepare, 3, program, n, p)
        for axis, sizes in (("n", GROWTH_N), ("p", GROWTH_P))
        for n, p in sizes
        for program in ("VD-ARD (BIC)", "ARDRegression")
        if program != "ARDRegression" or p <= MOST_FEATURES_ARD
    ]


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against n and against p."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained", sharey="row")
    for column, (name, label) in enumerate(
        (("n", "data n (p = 100 features)"), ("p", "features p (n = 200 data)"))
    ):
        for row, (key, unit) in enumerate(
            (("ms", "processor time (ms)"), ("mib", "memory (MiB), 1 or less as 1"))
        ):
            axis = axes[row, column]
            for series, marker in (("VD-ARD (BIC)", "o"), ("ARDRegression", "s")):
                mine = [q for q in points if (q["axis"], q["series"]) == (name, series)]
                axis.loglog(
                    [q[name] for q in mine],
                    [max(q[key], LEAST_SEEN) for q in mine],
                    marker=marker,
                    label=series,
                )
            ours = [q for q in points if (q["axis"], q["series"]) == (name, "VD-ARD (BIC)")]
            ends = np.array([ours[1][name], ours[-1][name]])
            height = 0.4 * max(ours[-1][key], 1.0)
            axis.loglog(ends, height * ends / ends[1], "k--", lw=1, label="slope 1")
            axis.set(xlabel=label, ylabel=unit if column == 0 else "")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle("Linear regression, ten features matter, one thread", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "vdard_speed.json")
    parser.add_argument("--repeat", action="store_true")
    arguments = parser.parse_args()
    out: Path = arguments.out
    again = out.with_name(out.stem + "_repeats.json")
    one_thread()
    if arguments.repeat:
        repeat(again)
        runs = json.loads(out.read_text())["runs"]
        out.with_suffix(".md").write_text(table(runs) + repeats(again, runs))
        return
    runs = compare()
    points = growth()
    content = {
        "script": "benchmarks/vdard_speed.py",
        "threads": 1,
        "time": "processor time of the fit, time.process_time",
        "noise": NOISE,
        "num_relevant": NUM_RELEVANT,
        "environment": environment("scipy"),
        "runs": runs,
        "growth": points,
    }
    write_json(out, content)
    plot(points, out.with_suffix(".png"))
    out.with_suffix(".md").write_text(table(runs) + repeats(again, runs))
    print(table(runs))


if __name__ == "__main__":
    main()
