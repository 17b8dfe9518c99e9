"""Relevance vector classification.

    logit P(class | x) = f(x) = b + sum_m w_m phi_m(x),   w_m ~ N(0, 1 / alpha_m)

with a flat prior on ``b``. The weights are integrated out by Laplace's approximation
(:mod:`~.rvm_laplace`) and the evidence raised as in regression, by any of the same methods.

More than two classes: each has its own machine, with its own weights, basis functions and
precisions, that tells it from the rest. The multinomial likelihood would couple them through a
posterior of the size of all classes' weights together, and the search would need every pair of
classes for every candidate: K^2 times the work for probabilities that are seldom better. One
against the rest is what Tipping (2001) ran on more than two classes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn.functional import logsigmoid

from bayes_svdo.inference.rvm_basis import (
    DesignMatrix,
    Gamma,
    Kernel,
    Method,
    check_inputs,
    check_options,
    resolve_kernel,
)
from bayes_svdo.inference.rvm_fixed_point import iterate_logistic
from bayes_svdo.inference.rvm_laplace import LaplaceMode, LogisticSearch
from bayes_svdo.inference.rvm_posterior import AbstractSparseFunction, check_representable


@dataclass(frozen=True, kw_only=True)
class LogisticRVM(AbstractSparseFunction):
    """One fitted machine: the log odds of a class against the rest."""

    def log_odds(self, x: Tensor, *, moderated: bool = True) -> Tensor:  # (n, ...) -> (n,)
        """Log odds of the class.

        Args:
            x: ``(n, num_columns)`` inputs.
            moderated: Shrink the log odds for the uncertainty of the weights, by
                ``1 / sqrt(1 + pi v / 8)`` at variance ``v`` (MacKay, 1992), so that their sigmoid
                is the predictive probability, and not that of the mean weights.
        """
        mean, variance = self.latent(x)
        odds: Tensor = mean / (1 + math.pi / 8 * variance).sqrt() if moderated else mean
        return odds


@dataclass(frozen=True)
class RVMClassification:
    """A fitted relevance vector classification.

    Attributes:
        classes: ``(K,)`` the labels, in ascending order.
        machines: One per class if there are more than two; with two classes a single one, for the
            log odds of ``classes[1]``.
    """

    classes: Tensor
    machines: tuple[LogisticRVM, ...]

    @property
    def relevance(self) -> Tensor:  # (m,)
        """Indices of the basis functions that are relevant to any class."""
        relevance: Tensor = torch.cat([m.relevance for m in self.machines]).unique()
        return relevance

    @property
    def n_iter(self) -> int:
        """Rounds of the longest fit."""
        return max(machine.n_iter for machine in self.machines)

    @property
    def converged(self) -> bool:
        """Whether every machine's fit ended before ``max_iter``."""
        return all(machine.converged for machine in self.machines)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.classes.device

    def to(self, device: torch.device | str) -> RVMClassification:
        """The same on another device."""
        return RVMClassification(
            self.classes.to(device), tuple(machine.to(device) for machine in self.machines)
        )

    def decision_function(self, x: Tensor, *, moderated: bool = True) -> Tensor:
        """Log odds of ``classes[1]``, ``(n,)``, or of each class against the rest, ``(n, K)``."""
        odds = torch.stack([m.log_odds(x, moderated=moderated) for m in self.machines], 1)
        return odds[:, 0] if len(self.machines) == 1 else odds

    def predict_proba(self, x: Tensor, *, moderated: bool = True) -> Tensor:  # -> (n, K)
        """Probability of every class.

        With more than two classes, the probabilities of each against the rest, normalised.

        Args:
            x: ``(n, num_columns)`` inputs.
            moderated: See :meth:`LogisticRVM.log_odds`.
        """
        odds = self.decision_function(x, moderated=moderated)
        if odds.dim() == 1:
            return torch.stack([-odds, odds], 1).sigmoid()
        # In logarithms: every class may be improbable far from the data.
        return logsigmoid(odds).softmax(1)

    def predict(self, x: Tensor) -> Tensor:  # (n, num_columns) -> (n,)
        """The most probable label."""
        odds = self.decision_function(x)
        return self.classes[(odds > 0).long() if odds.dim() == 1 else odds.argmax(1)]


@torch.no_grad()
def fit_rvm_classification(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel = "linear",
    gamma: Gamma = "scale",
    degree: int = 3,
    coef0: float = 1.0,
    fit_intercept: bool = True,
    method: Method = "fast",
    tol: float = 1e-3,
    max_iter: int = 1000,
    max_kernel_bytes: int = 2**30,
) -> RVMClassification:
    """Fit relevance vector machines to labels ``y`` given ``x``.

    Args:
        x: ``(n, d)`` inputs, float64 or float32, on any device.
        y: ``(n,)`` labels: integers, booleans, or floats of integer value.
        kernel: ``"linear"`` (the features are the basis functions), ``"rbf"``, ``"poly"``,
            ``"precomputed"`` or a function; see :func:`~.rvm_basis.resolve_kernel`.
        gamma: Parameter of ``"rbf"`` and ``"poly"``; a number, ``"scale"`` or ``"auto"``.
        degree: Degree of ``"poly"``.
        coef0: Constant of ``"poly"``.
        fit_intercept: Whether to include an intercept, under a flat prior.
        method: ``"fast"``: grow from the empty model (:mod:`~.rvm_laplace`). ``"mackay"`` and
            ``"em"``: shrink from the full one by the older updates (:mod:`~.rvm_fixed_point`). With
            a kernel one of their iterations costs ``n^3`` at first, and ``d^2 (n + d)`` with
            ``"linear"``.
        tol: An action that raises the log evidence by less, in nats, is not taken.
        max_iter: Most rounds (``"fast"``) or updates for each machine.
        max_kernel_bytes: Size up to which the kernel matrix is kept in memory. A larger one is
            computed again in every round (``"fast"`` only).

    Raises:
        TypeError: ``x`` is not a float tensor, ``y`` not a tensor, or ``fit_intercept`` neither
            True nor False.
        ValueError: ``y`` has a single class or is continuous, or an argument is out of its range,
            NaN or infinite, or has the wrong shape; or the units of ``x`` are so extreme that a
            variance of a weight leaves the range of its dtype.
        ArithmeticError: A posterior precision is singular to rounding.
    """
    check_inputs(x, y)
    fit_intercept = check_options(fit_intercept, method, tol, max_iter, max_kernel_bytes)
    classes = _check_labels(y)
    basis = resolve_kernel(x, kernel, gamma, degree, coef0)
    design = DesignMatrix(basis, x, centred=fit_intercept, max_bytes=max_kernel_bytes)
    machines = []
    for label in classes[1:] if len(classes) == 2 else classes:
        search = LogisticSearch(design, (y == label).double())
        if method == "fast":
            found = search.run(tol=tol, max_iter=max_iter)
        else:
            found = iterate_logistic(search, update=method, tol=tol, max_iter=max_iter)
        machines.append(_in_units_of_the_data(design, *found))
    result = RVMClassification(classes, tuple(machines))
    if not result.converged:
        warnings.warn(
            f"max_iter = {max_iter} rounds reached while the log evidence was still rising, for "
            f"{sum(not m.converged for m in machines)} of {len(machines)} machines. Try a larger "
            "max_iter or tol.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return result


def _check_labels(y: Tensor) -> Tensor:
    """The distinct labels, in order."""
    if y.is_floating_point() and bool((y != y.round()).any()):
        raise ValueError(
            f"y has dtype {y.dtype} and values that are not integers, so they are no labels.\n"
            "  Try fit_rvm_regression for a continuous target."
        )
    classes: Tensor = y.unique()
    if len(classes) < 2:
        raise ValueError(
            f"y has a single class, {classes.tolist()}; at least two are needed to tell apart."
        )
    return classes


def _in_units_of_the_data(
    design: DesignMatrix, mode: LaplaceMode, trace: list[float], converged: bool
) -> LogisticRVM:
    """Undo the scaling of the basis functions, and sort by index."""
    x = design.x
    order = np.argsort(mode.indices)
    indices = torch.tensor(sorted(mode.indices), dtype=torch.long, device=x.device)
    scale = design.scale[indices].double()

    def at_home(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(x.device)

    covariance = at_home(mode.covariance[order][:, order]) * torch.outer(scale, scale)
    covariance = covariance.to(x.dtype)
    alpha = (at_home(np.exp(mode.log_alpha[order])) / scale.square()).to(x.dtype)
    check_representable(covariance, alpha)
    shift = at_home(mode.at.phi_mean[order]) / scale
    return LogisticRVM(
        basis=design.basis.at(x, indices),
        weights=(at_home(mode.mean[order]) * scale).to(x.dtype),
        covariance=covariance,
        alpha=alpha,
        fit_intercept=design.centred,
        basis_mean=design.mean[indices] + shift.to(x.dtype),
        level=x.new_tensor(mode.intercept + float(mode.at.phi_mean @ mode.mean)),
        level_variance=x.new_tensor(1 / mode.at.total if design.centred else 0.0),
        log_evidence=torch.tensor(trace, dtype=torch.float64),
        converged=converged,
    )
