"""Choose the C of an L1 logistic regression by cross-validation along warm-started paths."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold, check_cv
from torch import Tensor

from bayes_svdo.inference.arguments import check_flag, check_name, check_rate, check_seed
from bayes_svdo.inference.l1 import L1LogisticFit, fit_l1_logistic, l1_logistic_path, l1_min_c
from bayes_svdo.inference.l1_solver import Solver
from bayes_svdo.inference.l1_validation import check_Cs, check_data, check_options, check_tol

__all__ = ["L1CrossValidation", "cross_validate_l1"]

_SPAN = 1e3  # of the default grid, upwards from the C at which all weights are zero
_PATH_TOL = 1e-4  # a relative gap that moves a held-out score by far less than a fold does


@dataclass(frozen=True, eq=False)
class L1CrossValidation:
    """What cross-validation found.

    Attributes:
        Cs: The grid, ascending, ``(G,)``.
        log_loss: Mean log-loss of the held-out samples in nats, ``(folds, G)``.
        accuracy: Share of the held-out samples that were classified right, ``(folds, G)``.
        num_nonzero: Weights that are not zero, ``(folds, G)``.
        index: Position of the chosen C in the grid.
        fit: The fit to all samples at the chosen C.
    """

    Cs: Tensor
    log_loss: Tensor
    accuracy: Tensor
    num_nonzero: Tensor
    index: int
    fit: L1LogisticFit

    @property
    def C(self) -> float:
        """The chosen C."""
        return float(self.Cs[self.index])


def cross_validate_l1(
    x: Tensor,  # (n, D)
    y: Tensor,  # (n,)
    *,
    Cs: int | Iterable[float] | Tensor = 20,
    cv: Any = 5,
    scoring: Literal["log_loss", "accuracy"] = "log_loss",
    rule: Literal["best", "one_standard_error"] = "best",
    fit_intercept: bool = True,
    tol: float | None = None,
    path_tol: float = _PATH_TOL,
    max_iter: int = 10_000,
    solver: Solver = "auto",
    random_state: int | None = 0,
) -> L1CrossValidation:
    """Score a grid of ``C`` on held-out folds, choose one and fit it to all samples.

    Args:
        x: Features, float32 or float64.
        y: Class indices ``0 .. K - 1``, every one present in every training part.
        Cs: The grid, or the number of its points: evenly spaced in log C over three decades
            upwards from :func:`~bayes_svdo.inference.l1.l1_min_c`.
        cv: Number of stratified, shuffled folds, or anything that
            ``sklearn.model_selection.check_cv`` takes: a splitter, or pairs of index arrays.
        scoring: What to choose by: the held-out log-loss or accuracy, averaged over folds.
        rule: ``"best"``, or ``"one_standard_error"``: the smallest C whose score is within one
            standard error of the best (Breiman et al. 1984, section 3.4.3). Of equal scores the
            smallest C is chosen, the sparsest.
        fit_intercept: Whether to fit intercepts.
        tol: Relative duality gap of the final fit.
        path_tol: Relative duality gap of the fits that are only scored.
        max_iter: Most steps of each fit.
        solver: As in :func:`~bayes_svdo.inference.l1.fit_l1_logistic`.
        random_state: Seed of the folds, where ``cv`` is a number.

    Returns:
        The scores, the chosen C, and the fit to all samples.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value, or a training part lacks a class.
    """
    if check_name("scoring", scoring) not in ("log_loss", "accuracy"):
        raise ValueError(f'scoring must be "log_loss" or "accuracy"; got {scoring!r}.')
    if check_name("rule", rule) not in ("best", "one_standard_error"):
        raise ValueError(f'rule must be "best" or "one_standard_error"; got {rule!r}.')
    fit_intercept = check_flag("fit_intercept", fit_intercept)
    check_options(max_iter, solver)
    path_tol = check_rate("path_tol", path_tol)
    seed = check_seed(random_state, "random_state")
    if seed is not None and not 0 <= seed < 2**32:
        raise ValueError(f"random_state must be from 0 to 2**32 - 1, but is {seed}.")
    _, num_classes = check_data(x, y, None)
    check_tol(tol, x.dtype)
    grid = _grid(x, y, Cs, fit_intercept)
    scores = [
        _score_fold(x, y, train, test, grid, fit_intercept, path_tol, max_iter, solver)
        for train, test in _folds(y, cv, seed, num_classes)
    ]
    log_loss, accuracy, num_nonzero = (torch.stack(column) for column in zip(*scores, strict=True))
    index = _choose(log_loss if scoring == "log_loss" else 1.0 - accuracy, rule)
    fit = fit_l1_logistic(
        x,
        y,
        C=grid[index],
        fit_intercept=fit_intercept,
        tol=tol,
        max_iter=max_iter,
        solver=solver,
    )
    return L1CrossValidation(
        Cs=torch.tensor(grid, dtype=torch.float64),
        log_loss=log_loss,
        accuracy=accuracy,
        num_nonzero=num_nonzero,
        index=index,
        fit=fit,
    )


def _grid(
    x: Tensor, y: Tensor, Cs: int | Iterable[float] | Tensor, fit_intercept: bool
) -> list[float]:
    if not isinstance(Cs, (int, np.integer)) or isinstance(Cs, bool):
        return sorted(check_Cs(Cs))  # type: ignore[arg-type]
    if Cs < 1:
        raise ValueError(f"Cs must be at least one point; got {Cs}.")
    smallest = l1_min_c(x, y, fit_intercept=fit_intercept)
    if not math.isfinite(smallest):
        smallest = 1.0  # no feature tells the classes apart: every C gives the same fit
    return [float(c) for c in smallest * np.geomspace(1.0, _SPAN, Cs)]


def _folds(
    y: Tensor, cv: Any, random_state: int | None, num_classes: int
) -> list[tuple[Tensor, Tensor]]:
    """Index tensors of the training and held-out parts; every class in every training part."""
    labels = y.cpu().numpy()
    if isinstance(cv, (int, np.integer)):
        cv = StratifiedKFold(int(cv), shuffle=True, random_state=random_state)
    splits = check_cv(cv, labels, classifier=True).split(np.zeros(len(labels)), labels)
    folds = []
    for number, (train, test) in enumerate(splits):
        absent = np.setdiff1d(np.arange(num_classes), labels[train])
        if len(absent):
            raise ValueError(
                f"class {absent[0]} is absent from the training part of fold {number}.\n"
                "  Try fewer folds, stratified folds, or more samples of that class."
            )
        if not len(test):
            raise ValueError(f"fold {number} holds out no sample.")
        folds.append((torch.as_tensor(train).to(y.device), torch.as_tensor(test).to(y.device)))
    return folds


def _score_fold(
    x: Tensor,
    y: Tensor,
    train: Tensor,
    test: Tensor,
    grid: list[float],
    fit_intercept: bool,
    tol: float,
    max_iter: int,
    solver: Solver,
) -> tuple[Tensor, Tensor, Tensor]:  # each (G,)
    path = l1_logistic_path(
        x[train],
        y[train],
        grid,
        fit_intercept=fit_intercept,
        tol=tol,
        max_iter=max_iter,
        solver=solver,
    )
    truth = y[test].long()
    log_loss, accuracy, num_nonzero = [], [], []
    for fit in path:
        log_probs = fit.log_probabilities(x[test])
        log_loss.append(-log_probs.gather(1, truth[:, None]).mean())
        accuracy.append((log_probs.argmax(1) == truth).double().mean())
        num_nonzero.append(fit.coef.count_nonzero())
    return torch.stack(log_loss), torch.stack(accuracy), torch.stack(num_nonzero)


def _choose(loss: Tensor, rule: str) -> int:  # (folds, G)
    """Position of the chosen column: of the smallest mean, or the first within its error of it."""
    mean = loss.double().mean(0)
    # argmin does not promise the first of equal entries; the mask does.
    bound = mean.min()
    if rule == "one_standard_error" and len(loss) > 1:
        best = int((mean == bound).nonzero()[0])
        bound = bound + loss[:, best].double().std() / math.sqrt(len(loss))
    return int((mean <= bound).nonzero()[0])
