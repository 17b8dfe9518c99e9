"""L1-regularised logistic regression, binary and multinomial, to a certified accuracy.

The objective is scikit-learn's, ``C * sum_i log_loss_i + sum |coef|``, with an intercept that is
not penalised. It is convex, so a fit is described by its value and by its duality gap: how far
above the minimum that value can be. Weights outside the support are exactly zero.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from bayes_svdo.inference.arguments import check_flag
from bayes_svdo.inference.l1_problem import L1Problem, standardised_problem
from bayes_svdo.inference.l1_solver import Solution, Solver, minimise
from bayes_svdo.inference.l1_validation import check_Cs, check_data, check_options, check_tol

__all__ = ["L1LogisticFit", "fit_l1_logistic", "l1_logistic_path", "l1_min_c"]

_DEFAULT_MAX_ITER = 10_000


@dataclass(frozen=True, eq=False)
class L1LogisticFit:
    """A fitted L1 logistic regression.

    Attributes:
        coef: Weights, ``(K, D)``, or ``(1, D)`` for two classes: the log-odds of the second.
        intercept: Intercepts, ``(K,)`` or ``(1,)``; zero where none was fitted.
        C: Weight of the log-loss against the penalty.
        objective: ``C * sum(log-loss) + sum(|coef|)``, in nats.
        duality_gap: ``objective`` is above its minimum by no more than this.
        n_iter: Newton steps and accelerated proximal gradient steps taken.
        converged: Whether the gap came below ``tol * objective``.
        classes: Class indices ``0 .. K - 1``.
    """

    coef: Tensor
    intercept: Tensor
    C: float
    objective: float
    duality_gap: float
    n_iter: int
    converged: bool
    classes: Tensor

    @property
    def relative_gap(self) -> float:
        """Duality gap as a share of the objective."""
        return self.duality_gap / self.objective

    @property
    def sparsity(self) -> float:
        """Share of the weights, intercepts aside, that are exactly zero."""
        return 1.0 - int(self.coef.count_nonzero()) / max(self.coef.numel(), 1)

    def log_probabilities(self, x: Tensor) -> Tensor:  # (n, D) -> (n, K)
        """Logarithm of the probability of each class."""
        if x.ndim != 2 or x.shape[1] != self.coef.shape[1]:
            raise ValueError(
                f"x must be (n, {self.coef.shape[1]}), one column per feature of the fit; "
                f"got shape {tuple(x.shape)}."
            )
        logits = x @ self.coef.T + self.intercept
        if len(self.coef) == 1:
            return torch.cat([F.logsigmoid(-logits), F.logsigmoid(logits)], 1)
        return torch.log_softmax(logits, 1)

    def predict(self, x: Tensor) -> Tensor:  # (n, D) -> (n,)
        """The most probable class of each sample."""
        return self.log_probabilities(x).argmax(1)


def fit_l1_logistic(
    x: Tensor,  # (n, D)
    y: Tensor,  # (n,)
    *,
    C: float = 1.0,
    fit_intercept: bool = True,
    sample_weight: Tensor | None = None,  # (n,)
    tol: float | None = None,
    max_iter: int = _DEFAULT_MAX_ITER,
    init: L1LogisticFit | None = None,
    solver: Solver = "auto",
) -> L1LogisticFit:
    """Minimise ``C * sum_i sample_weight_i * log_loss_i + sum |coef|``.

    Features are centred and scaled inside, exactly: the penalty of each weight is rescaled with
    it, so the optimum is that of the features as given. Work is done in the dtype and on the
    device of ``x``, on one standardised copy of it.

    Args:
        x: Features, float32 or float64.
        y: Class indices ``0 .. K - 1``, every one of them present.
        C: Weight of the log-loss; the smaller, the sparser. Below :func:`l1_min_c` every weight
            is zero.
        fit_intercept: Whether to fit intercepts, which are not penalised.
        sample_weight: Non-negative weights of the samples; one by default.
        tol: Stop when the duality gap is at most this share of the objective, which is then within
            that share of the minimum. Default: 1e-6 in float64, 1e-4 in float32.
        max_iter: Most Newton and proximal gradient steps.
        init: An earlier fit of the same shape, to start from.
        solver: ``"newton"`` takes proximal Newton steps on a growing working set, ``"fista"``
            accelerated proximal gradient steps with adaptive restart; ``"auto"`` takes Newton
            steps where their linear systems are affordable, else FISTA until they are.

    Returns:
        The fit. Where several minima share the objective (duplicate columns), it is one of them.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value, or a class is missing.

    Warns:
        sklearn.exceptions.ConvergenceWarning: If the gap stays above the tolerance.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
        >>> fit_l1_logistic(x, torch.tensor([0, 0, 1, 1])).predict(x)
        tensor([0, 0, 1, 1])
    """
    return l1_logistic_path(
        x,
        y,
        [C],
        fit_intercept=fit_intercept,
        sample_weight=sample_weight,
        tol=tol,
        max_iter=max_iter,
        init=init,
        solver=solver,
    )[0]


def l1_logistic_path(
    x: Tensor,  # (n, D)
    y: Tensor,  # (n,)
    Cs: Iterable[float] | Tensor,
    *,
    fit_intercept: bool = True,
    sample_weight: Tensor | None = None,  # (n,)
    tol: float | None = None,
    max_iter: int = _DEFAULT_MAX_ITER,
    init: L1LogisticFit | None = None,
    solver: Solver = "auto",
) -> tuple[L1LogisticFit, ...]:
    """Fits at several ``C``, each started from the one before, from the smallest ``C`` up.

    Args:
        x: Features, float32 or float64.
        y: Class indices ``0 .. K - 1``, every one of them present.
        Cs: Weights of the log-loss, in any order.
        fit_intercept: As in :func:`fit_l1_logistic`, like all that follow.
        sample_weight: Non-negative weights of the samples.
        tol: Relative duality gap of each fit.
        max_iter: Most steps of each fit.
        init: An earlier fit, to start the smallest ``C`` from.
        solver: How to minimise.

    Returns:
        One fit per ``C``, in the order of ``Cs``.
    """
    grid = check_Cs(Cs)
    fit_intercept = check_flag("fit_intercept", fit_intercept)
    check_options(max_iter, solver)
    weights, num_classes = check_data(x, y, sample_weight)
    accuracy = check_tol(tol, x.dtype)
    problem = _problem(x, y, weights, num_classes, fit_intercept)
    weight = problem.null_weight() if init is None else _standardised(problem, init)
    fits: dict[int, L1LogisticFit] = {}
    for index in sorted(range(len(grid)), key=grid.__getitem__):
        scaled = problem.with_scale(grid[index] * problem.loss.scale)
        solution = minimise(scaled, weight, tol=accuracy, max_iter=max_iter, solver=solver)
        weight = solution.weight
        fits[index] = _fit(problem, solution, grid[index], num_classes)
        if not solution.converged:
            _warn(fits[index], solution, accuracy, x.dtype)
    return tuple(fits[index] for index in range(len(grid)))


def l1_min_c(
    x: Tensor,  # (n, D)
    y: Tensor,  # (n,)
    *,
    fit_intercept: bool = True,
    sample_weight: Tensor | None = None,  # (n,)
) -> float:
    """The largest ``C`` at which every weight is zero, in closed form.

    It is one over the largest gradient of the summed log-loss at zero weights, where the intercept
    is the log-frequencies of the classes. For two classes and no intercept it is
    ``sklearn.svm.l1_min_c(..., loss="log", fit_intercept=False)``; with an intercept it is not,
    because scikit-learn's function penalises the intercept.

    Returns:
        The bound; infinite where no feature tells the classes apart at all.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If an argument has the wrong shape or value, or a class is missing.
    """
    fit_intercept = check_flag("fit_intercept", fit_intercept)
    weights, num_classes = check_data(x, y, sample_weight)
    with torch.no_grad():
        problem = _problem(x, y, weights, num_classes, fit_intercept)
        gradient = problem.evaluate(problem.null_weight()).gradient
        pull = problem.relative(gradient)
        largest = float(pull.amax()) if pull.numel() else 0.0
    return 1.0 / largest if largest > 0.0 else math.inf


def _problem(
    x: Tensor, y: Tensor, weights: Tensor, num_classes: int, fit_intercept: bool
) -> L1Problem:
    with torch.no_grad():
        # Samples of no weight must not move the centre of the features either.
        kept = weights > 0.0
        if not bool(kept.all()):
            x, y, weights = x[kept], y[kept], weights[kept]
        return standardised_problem(x, y.long(), weights, num_classes, fit_intercept)


def _standardised(problem: L1Problem, init: L1LogisticFit) -> Tensor:  # -> (K, D)
    """The weights of an earlier fit in the problem's standardised coordinates."""
    weight = problem.null_weight()
    num = problem.num_penalised
    if init.coef.shape != (len(weight), num):
        raise ValueError(
            f"init.coef must be ({len(weight)}, {num}), as the data ask; "
            f"got {tuple(init.coef.shape)}."
        )
    coef, intercept = init.coef.to(weight), init.intercept.to(weight)
    alive = problem.design[:num].abs().amax(1) > 0.0
    weight[:, :num] = torch.where(alive, coef * problem.spread[:num], 0.0)
    if problem.fit_intercept:
        weight[:, -1] = intercept + coef @ problem.offset[:num]
    return weight


def _fit(problem: L1Problem, solution: Solution, C: float, num_classes: int) -> L1LogisticFit:
    num = problem.num_penalised
    coef = solution.weight[:, :num] / problem.spread[:num]
    intercept = coef.new_zeros(len(coef))
    if problem.fit_intercept:
        bias = solution.weight[:, -1] - coef @ problem.offset[:num]
        # The intercepts of a softmax are free up to a constant: scikit-learn's sum to zero, too.
        intercept = bias - bias.mean() if num_classes > 2 else bias
    return L1LogisticFit(
        coef=coef,
        intercept=intercept,
        C=C,
        objective=solution.point.value,
        duality_gap=solution.point.gap,
        n_iter=solution.n_iter,
        converged=solution.converged,
        classes=torch.arange(num_classes, device=coef.device),
    )


def _warn(fit: L1LogisticFit, solution: Solution, tol: float, dtype: torch.dtype) -> None:
    remedy = (
        f"Rounding in {dtype} allows no less: try x.double(), or a larger tol"
        if solution.stalled
        else "Try a larger max_iter or tol"
    )
    warnings.warn(
        f"L1 logistic regression at C={fit.C:g} stopped after {fit.n_iter} steps with a duality "
        f"gap of {fit.relative_gap:.1e} of the objective, above tol={tol:g}. {remedy}.",
        ConvergenceWarning,
        stacklevel=3,
    )
