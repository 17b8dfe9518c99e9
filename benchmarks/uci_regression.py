"""Real data: VD-ARD and the relevance vector machine beside scikit-learn's sparse regressions.

    python benchmarks/uci_regression.py                 # all sets; writes results/uci_regression.*
    python benchmarks/uci_regression.py --sets yacht boston --splits 3
    python benchmarks/uci_regression.py --table         # the Markdown from the JSON, no runs

Boston, concrete, energy, kin8nm and yacht on their 20 published splits (`bayes_svdo.data`), and
diabetes, with its 10 features and with all 65 products of at most two, on 20 random splits of 300
to train and 142 to test. Runs that are in the results file already are not done again.

Features and target are standardised by the training part (ARDRegression's threshold has units, so
this is what it is meant for); errors and densities are given in the units of the target. Every
method fits an intercept, and is used as it comes. The log-likelihood is that of the method's own
Gaussian predictive distribution; LassoCV and least squares have none, and get one with the
unbiased estimate of the noise of their training residuals. The RBF kernel's `gamma` is, for each
split, that of `GAMMAS / features` with the highest evidence on the training part; on kin8nm (7,373
to train) it is chosen on the first 1,000. Nothing is chosen on test data.
"Nonzero" counts coefficients, or relevance vectors. ARDRegression sets a coefficient to 0 only
where its precision exceeds 1e4, so its count says little.
Times are processor seconds of one thread, choice of hyperparameters included.
"""

from __future__ import annotations

import argparse
import json
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
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import ARDRegression, LassoCV, LinearRegression
from sklearn.preprocessing import PolynomialFeatures

from bayes_svdo import data
from bayes_svdo.inference.exact_regression import DegenerateObjectiveError, fit_vdard_regression
from bayes_svdo.inference.relevance_vector_machine import fit_rvm_regression

Array = NDArray[np.float64]
NUM_SPLITS = 20
NUM_TRAIN_DIABETES = 300
GAMMAS = (0.1, 0.2, 0.5, 1.0, 2.0)
MOST_DATA_TO_CHOOSE_GAMMA = 1000
UCI = ("boston", "concrete", "energy", "kin8nm", "yacht")
SETS = ("diabetes", "diabetes, degree 2", *UCI)


class Fitted(NamedTuple):
    """What is compared of a method, in standardised units."""

    nonzero: int
    num_basis: int
    mean: Array
    std: Array | float
    chosen: dict[str, float] | None = None


def load(name: str, split: int) -> tuple[Array, Array, Array, Array]:
    """Training x and y, test x and y, in their own units."""
    if name in UCI:
        found = data.load(name, split=split)
        (x, y), (x_test, y_test) = found.train, found.test
        return x.numpy(), y.numpy(), x_test.numpy(), y_test.numpy()
    x, y = load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(split).permutation(len(y))
    train, test = order[:NUM_TRAIN_DIABETES], order[NUM_TRAIN_DIABETES:]
    if name.endswith("degree 2"):
        x = (x - x[train].mean(0)) / x[train].std(0)
        x = PolynomialFeatures(2, include_bias=False).fit_transform(x)
    return x[train], y[train], x[test], y[test]


def vdard(kl_weight: float | str) -> Callable[[Array, Array, Array], Fitted | None]:
    """VD-ARD with the given threshold; None where its objective has no maximum."""

    def fit(x: Array, y: Array, x_test: Array) -> Fitted | None:
        try:
            found = fit_vdard_regression(
                torch.from_numpy(x), torch.from_numpy(y), kl_weight=kl_weight
            )
        except DegenerateObjectiveError:
            return None
        predicted, std = found.predict(torch.from_numpy(x_test), return_std=True)
        return Fitted(int(found.kept.sum()), x.shape[1], predicted.numpy(), std.numpy())

    return fit


def rvm_linear(x: Array, y: Array, x_test: Array) -> Fitted:
    """The relevance vector machine on the features themselves."""
    found = fit_rvm_regression(torch.from_numpy(x), torch.from_numpy(y), kernel="linear")
    predicted, std = found.predict(torch.from_numpy(x_test), return_std=True)
    return Fitted(len(found.weights), x.shape[1], predicted.numpy(), std.numpy())


def rvm_rbf(x: Array, y: Array, x_test: Array) -> Fitted:
    """The relevance vector machine with a Gaussian kernel, its width by the evidence."""
    inputs, targets = torch.from_numpy(x), torch.from_numpy(y)
    few = slice(MOST_DATA_TO_CHOOSE_GAMMA)

    def evidence(gamma: float) -> float:
        found = fit_rvm_regression(inputs[few], targets[few], kernel="rbf", gamma=gamma)
        return float(found.log_evidence[-1])

    gamma = max((g / x.shape[1] for g in GAMMAS), key=evidence)
    found = fit_rvm_regression(inputs, targets, kernel="rbf", gamma=gamma)
    predicted, std = found.predict(torch.from_numpy(x_test), return_std=True)
    return Fitted(len(found.weights), len(x), predicted.numpy(), std.numpy(), {"gamma": gamma})


def ard(x: Array, y: Array, x_test: Array) -> Fitted:
    """scikit-learn's ARDRegression, as it comes."""
    found = ARDRegression().fit(x, y)
    return Fitted(np.count_nonzero(found.coef_), x.shape[1], *found.predict(x_test, True))


def lasso(x: Array, y: Array, x_test: Array) -> Fitted:
    """The lasso, its penalty by 5-fold cross-validation."""
    return _plug_in(LassoCV().fit(x, y), x, y, x_test)


def least_squares(x: Array, y: Array, x_test: Array) -> Fitted:
    """Least squares."""
    return _plug_in(LinearRegression().fit(x, y), x, y, x_test)


def _plug_in(found: Any, x: Array, y: Array, x_test: Array) -> Fitted:
    nonzero = np.count_nonzero(found.coef_)
    noise = math.sqrt(((y - found.predict(x)) ** 2).sum() / max(len(y) - 1 - nonzero, 1))
    return Fitted(nonzero, x.shape[1], found.predict(x_test), noise)


METHODS: dict[str, Callable[[Array, Array, Array], Fitted | None]] = {
    "VD-ARD, kl_weight 1": vdard(1.0),
    "VD-ARD, kl_weight 2 (AIC)": vdard("aic"),
    "VD-ARD, kl_weight log N (BIC)": vdard("bic"),
    "RVM, linear": rvm_linear,
    "ARDRegression": ard,
    "LassoCV": lasso,
    "least squares": least_squares,
    "RVM, RBF": rvm_rbf,
}


def run(name: str, split: int, method: str) -> dict[str, Any]:
    """One method on one split."""
    x, y, x_test, y_test = load(name, split)
    x_mean, x_scale, y_mean, y_scale = x.mean(0), x.std(0), y.mean(), y.std()
    x_scale = np.where(x_scale > 0, x_scale, 1.0)
    x, x_test = ((part - x_mean) / x_scale for part in (x, x_test))
    started = time.process_time()
    found = METHODS[method](x, (y - y_mean) / y_scale, x_test)
    seconds = time.process_time() - started
    scores = None
    if found is not None:
        error = found.mean * y_scale + y_mean - y_test
        variance = np.square(found.std * y_scale)
        density = -0.5 * (np.log(2 * math.pi * variance) + error**2 / variance)
        scores = {
            "nonzero": int(found.nonzero),
            "num_basis": int(found.num_basis),
            "rmse": float(np.sqrt(np.mean(error**2))),
            "test_log_likelihood": float(density.mean()),
        }
        if found.chosen is not None:
            scores["chosen"] = found.chosen
    key = {"set": name, "split": split, "method": method}
    return key | {"num_train": len(y), "num_features": x.shape[1]} | {
        "seconds": seconds, "scores": scores
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over splits, as Markdown."""
    lines = [f"Mean (standard deviation) over splits. {ARD_CAVEAT}", ""]
    for name in SETS:
        of_set = [r for r in runs if r["set"] == name]
        if not of_set:
            continue
        size = f"{of_set[0]['num_train']} to train, {of_set[0]['num_features']} features"
        lines += [
            f"### {name} ({size})",
            "",
            "| method | splits | nonzero | test RMSE | test log-likelihood | s |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for method in METHODS:
            mine = [r for r in of_set if r["method"] == method]
            scores = [r["scores"] for r in mine if r["scores"] is not None]
            if not scores:
                continue
            cells = [
                mean_and_sd([s[key] for s in scores], digits)
                for key, digits in (("nonzero", 1), ("rmse", 3), ("test_log_likelihood", 3))
            ]
            cells.append(f"{mean(r['seconds'] for r in mine):.2g}")
            lines.append(f"| {method} | {len(scores)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, and write the results as JSON and as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--splits", type=int, default=NUM_SPLITS)
    parser.add_argument("--out", type=Path, default=RESULTS / "uci_regression.json")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    out: Path = arguments.out
    torch.set_num_threads(1)
    # Coordinate descent that stops short of its tolerance is part of what LassoCV is.
    warnings.simplefilter("ignore", ConvergenceWarning)
    runs = json.loads(out.read_text())["runs"] if out.exists() else []
    done = {(r["set"], r["split"], r["method"]) for r in runs}
    if not arguments.table:
        for method in arguments.methods:
            for name in arguments.sets:
                for split in range(arguments.splits):
                    if (name, split, method) not in done:
                        runs.append(run(name, split, method))
                        _write(out, runs)
                print(method, name, "done", flush=True)
    out.with_suffix(".md").write_text(table(runs))
    print(table(runs))


def _write(out: Path, runs: list[dict[str, Any]]) -> None:
    content = {
        "script": "benchmarks/uci_regression.py",
        "data": "UCI with published splits; diabetes: 300/142, permuted by seed = split",
        "threads": 1,
        "gammas_times_features": GAMMAS,
        "environment": environment("scipy"),
        "runs": sorted(runs, key=lambda r: (SETS.index(r["set"]), r["split"], r["method"])),
    }
    write_json(out, content)
    out.with_suffix(".md").write_text(table(runs))


if __name__ == "__main__":
    main()
