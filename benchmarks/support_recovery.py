"""Which features are found: VD-ARD regression beside the RVM and scikit-learn, synthetic designs.

    python benchmarks/support_recovery.py            # 20 seeds; writes results/support_recovery.*
    python benchmarks/support_recovery.py --seeds 3

Ten of the features matter, with weights of either sign drawn from U(0.5, 1.5); columns are
standard normal, independent or an AR(0.7) sequence. Every method fits an intercept. A feature
counts as found if its coefficient is not 0, as the method itself leaves it: ARDRegression sets
coefficients to 0 only where their precision exceeds 1e4, so its count says little. The test
log-likelihood is that of the method's own Gaussian predictive distribution; LassoCV and least
squares have none and get one with the unbiased estimate of the noise of their training residuals.
Times are processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from environment import ARD_CAVEAT, RESULTS, environment, mean_and_sd, write_json
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ARDRegression, LassoCV, LinearRegression

from bayes_svdo.inference.exact_regression import DegenerateObjectiveError, fit_vdard_regression
from bayes_svdo.inference.relevance_vector_machine import NoiseBoundWarning, fit_rvm_regression
from bayes_svdo.inference.rvm_regression import Method

Array = NDArray[np.float64]
NUM_RELEVANT = 10
NUM_TEST = 1000


class Design(NamedTuple):
    """A way to draw data."""

    num_data: int
    num_features: int
    correlation: float  # of neighbouring columns
    noise: float  # standard deviation


DESIGNS = {
    "N 200, D 100": Design(200, 100, 0.0, 1.0),
    "N 200, D 100, AR(0.7)": Design(200, 100, 0.7, 1.0),
    "N 100, D 200": Design(100, 200, 0.0, 0.5),
    "N 1000, D 100": Design(1000, 100, 0.0, 2.0),
}


class Fitted(NamedTuple):
    """What is compared of a method."""

    coefficients: Array  # (D,)
    mean: Array  # (NUM_TEST,)
    std: Array | float  # (NUM_TEST,)


def draw(design: Design, seed: int) -> tuple[Array, Array, Array, Array, Array]:
    """Training x and y, test x and y, and the true weights."""
    generator = np.random.default_rng(seed)
    num = design.num_data + NUM_TEST
    x = generator.standard_normal((num, design.num_features))
    for d in range(1, design.num_features):
        x[:, d] *= math.sqrt(1 - design.correlation**2)
        x[:, d] += design.correlation * x[:, d - 1]
    weights = np.zeros(design.num_features)
    relevant = generator.permutation(design.num_features)[:NUM_RELEVANT]
    signs = generator.choice([-1.0, 1.0], NUM_RELEVANT)
    weights[relevant] = signs * generator.uniform(0.5, 1.5, NUM_RELEVANT)
    y = x @ weights + design.noise * generator.standard_normal(num)
    n = design.num_data
    return x[:n], y[:n], x[n:], y[n:], weights


def vdard(kl_weight: float | str) -> Callable[[Array, Array, Array], Fitted | None]:
    """VD-ARD with the given threshold; None where its objective has no maximum."""

    def fit(x: Array, y: Array, x_test: Array) -> Fitted | None:
        try:
            found = fit_vdard_regression(
                torch.from_numpy(x), torch.from_numpy(y), kl_weight=kl_weight
            )
        except DegenerateObjectiveError:
            return None
        prediction, std = found.predict(torch.from_numpy(x_test), return_std=True)
        return Fitted(found.loc.numpy(), prediction.numpy(), std.numpy())

    return fit


def rvm(method: Method) -> Callable[[Array, Array, Array], Fitted | None]:
    """The linear relevance vector machine; None where it fits without error, and says so."""

    def fit(x: Array, y: Array, x_test: Array) -> Fitted | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoiseBoundWarning)
            found = fit_rvm_regression(torch.from_numpy(x), torch.from_numpy(y), method=method)
        if found.noise_at_bound:
            return None
        prediction, std = found.predict(torch.from_numpy(x_test), return_std=True)
        return Fitted(found.coefficients.numpy(), prediction.numpy(), std.numpy())

    return fit


def ard(x: Array, y: Array, x_test: Array) -> Fitted:
    """scikit-learn's ARDRegression, as it comes."""
    found = ARDRegression().fit(x, y)
    return Fitted(found.coef_, *found.predict(x_test, return_std=True))


def lasso(x: Array, y: Array, x_test: Array) -> Fitted:
    """The lasso, its penalty by 5-fold cross-validation."""
    return _plug_in(LassoCV().fit(x, y), x, y, x_test)


def least_squares(x: Array, y: Array, x_test: Array) -> Fitted | None:
    """Least squares, where it is defined."""
    if x.shape[1] + 1 >= len(y):
        return None
    return _plug_in(LinearRegression().fit(x, y), x, y, x_test)


def _plug_in(found: Any, x: Array, y: Array, x_test: Array) -> Fitted:
    left = len(y) - 1 - np.count_nonzero(found.coef_)
    noise = math.sqrt(((y - found.predict(x)) ** 2).sum() / max(left, 1))
    return Fitted(found.coef_, found.predict(x_test), noise)


METHODS: dict[str, Callable[[Array, Array, Array], Fitted | None]] = {
    "VD-ARD, kl_weight 1": vdard(1.0),
    "VD-ARD, kl_weight 2 (AIC)": vdard("aic"),
    "VD-ARD, kl_weight log N (BIC)": vdard("bic"),
    "RVM, fast": rvm("fast"),
    "RVM, MacKay": rvm("mackay"),
    "ARDRegression": ard,
    "LassoCV": lasso,
    "least squares": least_squares,
}


def score(found: Fitted, y: Array, weights: Array) -> dict[str, float]:
    """Number of features found, test error and log-likelihood, F1 and recall of the support."""
    chosen, true = found.coefficients != 0, weights != 0
    hits = int((chosen & true).sum())
    variance = np.square(found.std)
    log_likelihood = -0.5 * (np.log(2 * math.pi * variance) + (y - found.mean) ** 2 / variance)
    return {
        "nonzero": int(chosen.sum()),
        "rmse": float(np.sqrt(np.mean((y - found.mean) ** 2))),
        "test_log_likelihood": float(np.mean(log_likelihood)),
        "f1": 2 * hits / (int(chosen.sum()) + int(true.sum())),
        "recall": hits / int(true.sum()),
    }


def run(seeds: int) -> list[dict[str, Any]]:
    """Every method on every design and seed."""
    runs = []
    for name, design in DESIGNS.items():
        for seed in range(seeds):
            x, y, x_test, y_test, weights = draw(design, seed)
            for method, fit in METHODS.items():
                started = time.process_time()
                found = fit(x, y, x_test)
                seconds = time.process_time() - started
                scores = None if found is None else score(found, y_test, weights)
                runs.append(
                    {"design": name, "seed": seed, "method": method}
                    | {"seconds": seconds, "scores": scores}
                )
        print(name, "done", flush=True)
    return runs


def table(runs: list[dict[str, Any]], seeds: int) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = [
        f"Mean (standard deviation) over {seeds} seeds; {NUM_RELEVANT} features matter. "
        f"{ARD_CAVEAT}",
        "",
    ]
    for design in DESIGNS:
        lines += [
            f"### {design}",
            "",
            "| method | nonzero | F1 | recall | test RMSE | test log-likelihood | ms |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for method in METHODS:
            mine = [r for r in runs if (r["design"], r["method"]) == (design, method)]
            scores = [r["scores"] for r in mine if r["scores"] is not None]
            if not scores:
                lines.append(f"| {method} | no maximum, or undefined | | | | | |")
                continue
            cells = [
                mean_and_sd([s[key] for s in scores], digits)
                for key, digits in (
                    ("nonzero", 1), ("f1", 2), ("recall", 2), ("rmse", 3),
                    ("test_log_likelihood", 3),
                )
            ]  # fmt: skip
            cells.append(f"{1000 * mean(r['seconds'] for r in mine):.0f}")
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run, and write the results as JSON and as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "support_recovery.json")
    seeds, out = (arguments := parser.parse_args()).seeds, arguments.out
    torch.set_num_threads(1)
    # Coordinate descent that stops short of its tolerance is part of what LassoCV is.
    warnings.simplefilter("ignore", ConvergenceWarning)
    runs = run(seeds)
    write_json(
        out,
        {
            "environment": environment("scipy"),
            "designs": {name: design._asdict() for name, design in DESIGNS.items()},
            "num_relevant": NUM_RELEVANT,
            "num_test": NUM_TEST,
            "runs": runs,
        },
    )
    text = table(runs, seeds)
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
