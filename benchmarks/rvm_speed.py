"""Speed of relevance vector regression beside its peers, in one run.

    python benchmarks/rvm_speed.py                  # writes results/rvm_speed.{json,md,png}
    python benchmarks/rvm_speed.py --parts growth   # time and memory against n only

The sinc of Tipping (2001) with noise of 0.1 at n random inputs, an RBF kernel of fixed width. For
each seed all programs fit the same data, one after the other, on one thread; times are processor
seconds of the fit (`time.process_time`), medians over seeds, and the ratios are medians of the
ratios within a seed. The error is that of the mean against the noiseless sinc.

The peers, each as it comes but for the kernel's width: `fastrvm` (C++, the fast algorithm), and,
where they are installed, `skrvm` (github.com/JamesRitchie/scikit-rvm; not on the package index) and
`sklearn_rvm` (`pip install --no-deps sklearn-rvm`), which begin with all n basis functions, so that
an iteration is cubic in n; they are left out where one fit takes minutes (SEEDS).
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from environment import RESULTS, environment, write_json
from fastrvm import RVR
from numpy.typing import NDArray
from resources import cost, one_thread, processor_ms

from bayes_svdo.inference.relevance_vector_machine import fit_rvm_regression

Array = NDArray[np.float64]
Prediction = Callable[[Array], Array]
PARTS = ("compare", "growth")
GAMMA = 0.2
NOISE = 0.1
SIZES = (300, 1000, 3000)
SEEDS = {
    "bayes_svdo": {300: 15, 1000: 9, 3000: 9},
    "fastrvm": {300: 15, 1000: 9, 3000: 9},
    "scikit-rvm": {300: 15, 1000: 5, 3000: 1},
    "sklearn_rvm": {300: 15, 1000: 5},
}
GROWTH = (100, 200, 500, 1000, 2000, 5000, 10_000)
# What a process has freed before it may take again unseen.
LEAST_SEEN = 1.0
KERNEL_KEPT, KERNEL_COMPUTED = 2**30, 0


def draw(n: int, seed: int) -> tuple[Array, Array]:
    """Inputs (n, 1) and targets (n,)."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(-10, 10, (n, 1))
    return x, sinc(x) + NOISE * generator.standard_normal(n)


def sinc(x: Array) -> Array:
    """``sin(x) / x``, (n, 1) -> (n,)."""
    return np.sinc(x[:, 0] / np.pi)


def ours(x: Array, y: Array) -> tuple[int, Prediction]:
    """Number of relevance vectors, and the fitted mean."""
    found = fit_rvm_regression(torch.from_numpy(x), torch.from_numpy(y), kernel="rbf", gamma=GAMMA)
    return len(found.weights), lambda grid: found.predict(torch.from_numpy(grid)).numpy()


def fastrvm(x: Array, y: Array) -> tuple[int, Prediction]:
    """The same of fastrvm."""
    found = RVR(kernel="rbf", gamma=GAMMA).fit(x, y)
    return len(found.relevance_), found.predict


def scikit_rvm(x: Array, y: Array) -> tuple[int, Prediction]:
    """The same of scikit-rvm."""
    found = import_module("skrvm").RVR(kernel="rbf", coef1=GAMMA).fit(x, y)
    return len(found.relevance_), found.predict


def sklearn_rvm(x: Array, y: Array) -> tuple[int, Prediction]:
    """The same of sklearn_rvm, whose fit returns nothing."""
    found = import_module("sklearn_rvm").EMRVR(kernel="rbf", gamma=GAMMA)
    found.fit(x, y)
    return len(found.relevance_), found.predict


PROGRAMS: dict[str, Callable[[Array, Array], tuple[int, Prediction]]] = {
    "bayes_svdo": ours,
    "fastrvm": fastrvm,
    "scikit-rvm": scikit_rvm,
    "sklearn_rvm": sklearn_rvm,
}


def installed() -> list[str]:
    """The programs that can be run here."""
    names = ["bayes_svdo", "fastrvm"]
    for name, module in (("scikit-rvm", "skrvm"), ("sklearn_rvm", "sklearn_rvm")):
        try:
            import_module(module)
        except ImportError:
            print(f"{name} is not installed: left out.")
        else:
            names.append(name)
    return names


def compare(names: list[str]) -> list[dict[str, Any]]:
    """Every program on every size and seed."""
    grid = np.linspace(-10, 10, 1000)[:, None]
    for name in names:
        PROGRAMS[name](*draw(50, 0))  # what is paid once only
    runs = []
    for n in SIZES:
        for seed in range(max(s.get(n, 0) for s in SEEDS.values())):
            for name in names:
                if seed >= SEEDS[name].get(n, 0):
                    continue
                x, y = draw(n, seed)
                ms, (vectors, predict) = processor_ms(lambda p=PROGRAMS[name], a=x, b=y: p(a, b))
                error = float(np.sqrt(np.mean((predict(grid) - sinc(grid)) ** 2)))
                runs.append(
                    {"program": name, "n": n, "seed": seed, "ms": ms}
                    | {"vectors": int(vectors), "error": error}
                )
        print(f"n = {n} done", flush=True)
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    """Medians and ratios, as Markdown."""
    lines = [
        "| n | program | fits | ms | time, x ours | relevance vectors | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for n in SIZES:
        own = {r["seed"]: r["ms"] for r in runs if (r["n"], r["program"]) == (n, "bayes_svdo")}
        for name in PROGRAMS:
            mine = [r for r in runs if (r["n"], r["program"]) == (n, name)]
            if mine:
                ratio = median(r["ms"] / own[r["seed"]] for r in mine)
                lines.append(
                    f"| {n} | {name} | {len(mine)} | {median(r['ms'] for r in mine):.4g} "
                    f"| {ratio:.2f} | {mean(r['vectors'] for r in mine):.1f} "
                    f"| {mean(r['error'] for r in mine):.4f} |"
                )
    return "\n".join(lines) + "\n"


def prepare(program: str, n: int, max_kernel_bytes: int) -> Callable[[], Any]:
    """A fit whose cost is to be measured."""
    one_thread()
    x, y = draw(n, 0)
    if program == "fastrvm":
        return lambda: fastrvm(x, y)
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    return lambda: fit_rvm_regression(
        inputs, targets, kernel="rbf", gamma=GAMMA, max_kernel_bytes=max_kernel_bytes
    )


def growth() -> list[dict[str, Any]]:
    """Time and memory against n."""
    return [
        {"series": series, "n": n} | cost(prepare, 3, program, n, kept)
        for n in GROWTH
        for series, program, kept in (
            ("bayes_svdo, kernel matrix kept", "bayes_svdo", KERNEL_KEPT),
            ("bayes_svdo, computed when needed", "bayes_svdo", KERNEL_COMPUTED),
            ("fastrvm", "fastrvm", 0),
        )
    ]


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against n."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for key, axis, label in (
        ("ms", axes[0], "processor time (ms)"),
        ("mib", axes[1], "memory (MiB), 1 or less as 1"),
    ):
        for series, marker in zip(dict.fromkeys(p["series"] for p in points), "os^", strict=True):
            mine = [p for p in points if p["series"] == series]
            axis.loglog(
                [p["n"] for p in mine],
                [max(p[key], LEAST_SEEN) for p in mine],
                marker=marker,
                label=series,
            )
        first = next(p for p in points if p["n"] == 1000)
        sizes = np.array([1000, GROWTH[-1]])
        height = 0.35 * max(first[key], 1.0)
        axis.loglog(sizes, height * (sizes / 1000) ** 2, "k--", lw=1, label="slope 2")
        axis.set(xlabel="training data n", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Relevance vector regression, sinc, RBF kernel, one thread", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "rvm_speed.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    out: Path = (arguments := parser.parse_args()).out
    one_thread()
    warnings.simplefilter("ignore")  # the peers': division by zero, overflow
    found = json.loads(out.read_text()) if out.exists() else {"runs": [], "growth": []}
    if "compare" in arguments.parts:
        found["runs"] = compare(installed())
        _write(out, found["runs"], found["growth"])
    if "growth" in arguments.parts:
        found["growth"] = growth()
        _write(out, found["runs"], found["growth"])
    print(table(found["runs"]))


def _write(out: Path, runs: list[dict[str, Any]], points: list[dict[str, Any]]) -> None:
    content = {
        "script": "benchmarks/rvm_speed.py",
        "threads": 1,
        "time": "processor time of the fit, time.process_time",
        "gamma": GAMMA,
        "noise": NOISE,
        "environment": environment("scipy", "fastrvm"),
        "runs": runs,
        "growth": points,
    }
    write_json(out, content)
    out.with_suffix(".md").write_text(table(runs))
    if points:
        plot(points, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
