"""The older updates of the relevance vector machine: MacKay's and EM, from all basis functions.

Both begin with every basis function in use, so an iteration is cubic in their number until most
have gone; :mod:`~bayes_svdo.inference.rvm_search` is the method to use. They are here to be
compared with: MacKay's fixed point is what Tipping (2001, eq. 16 and 18) and most other programs
iterate, and EM (his eq. 20) raises the evidence with certainty, though slowly. Under a logistic
likelihood both take the posterior at the mode of the weights (his section 3) and find the mode
again after every update.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from bayes_svdo.inference.rvm_evidence import (
    Array,
    Moments,
    NoiseRange,
    WeightPosterior,
    deletion_gain,
    unit_free,
    weight_posterior,
)
from bayes_svdo.inference.rvm_laplace import LaplaceMode, LogisticSearch, as_regression

Update: TypeAlias = Literal["mackay", "em"]

# MacKay's precisions of irrelevant weights grow geometrically without end. A weight that the data
# have determined by less than this fraction has no influence left and is dropped on the way.
_LEAST_DETERMINED = 1e-9


def iterate(
    data: Moments,
    log_alpha: Array,
    noise: NoiseRange,
    log_beta: float,
    *,
    update: Update,
    tol: float,
    max_iter: int,
) -> tuple[NDArray[np.intp], WeightPosterior, list[float], bool]:
    """Iterate until the evidence changes by less than ``tol``, then delete what is irrelevant.

    Neither update ever reaches ``alpha = inf``. Where it has settled, every basis function that is
    better off there is deleted, the worst first, and the iteration goes on with those that are
    left; it ends when there is nothing to delete.

    Returns:
        Positions of the basis functions that are left, their posterior, the log evidence after
        each iteration, and whether the iteration ended within ``max_iter``.

    Raises:
        ArithmeticError: The posterior precision is singular to rounding.
    """
    start = _Regression(
        data, noise, np.arange(len(log_alpha)), _posterior(data, log_alpha, log_beta)
    )
    end, trace, converged = _iterate(start, update, tol, max_iter)
    return end.kept, end.posterior, trace, converged


def iterate_logistic(
    search: LogisticSearch, *, update: Update, tol: float, max_iter: int
) -> tuple[LaplaceMode, list[float], bool]:
    """:func:`iterate` under a logistic likelihood, from every basis function that is not constant.

    An iteration finds the mode of all weights in use: a few factorisations, cubic in their number.
    As in :meth:`.LogisticSearch.run` the fixed point is not quite the maximum of Laplace's
    approximation, because the expansion moves with the precisions: not even EM is certain to raise
    the evidence with every update.

    Returns:
        The mode, the log evidence after each iteration, and whether the iteration ended within
        ``max_iter``.

    Raises:
        ArithmeticError: The posterior precision is singular to rounding.
    """
    design = search.design
    indices = (~design.is_null).nonzero().squeeze(1)
    count = len(indices)
    start = search.mode(
        indices.tolist(),
        design.rows(indices).double(),
        # Prior variances that together give the log odds a variance of 1.
        np.full(count, math.log(max(count, 1) / design.num_data)),
        np.zeros(count),
        search.empty().intercept,
    )
    end, trace, converged = _iterate(_Logistic.at(search, start), update, tol, max_iter)
    return end.mode, trace, converged


class _AbstractFit(ABC):
    """Basis functions in use, their precisions, and the posterior of their weights."""

    posterior: WeightPosterior

    @property
    @abstractmethod
    def log_evidence(self) -> float:
        """In nats, up to a constant."""

    @abstractmethod
    def updated(self, update: Update) -> Self:
        """The fit after one update of all precisions."""

    @abstractmethod
    def select(self, left: NDArray[np.bool_]) -> Self:
        """The fit of some of the basis functions, at the same precisions."""


@dataclass(frozen=True)
class _Regression(_AbstractFit):
    data: Moments
    noise: NoiseRange
    kept: NDArray[np.intp]
    posterior: WeightPosterior

    @property
    def log_evidence(self) -> float:
        return self.posterior.log_evidence

    def updated(self, update: Update) -> Self:
        data, noise, posterior = self.data, self.noise, self.posterior
        scaled, _ = unit_free(posterior)
        count = float((1 - scaled.diagonal()).sum())
        if update == "em":
            variance = (posterior.residual + count / math.exp(posterior.log_beta)) / data.num_data
        else:
            variance = posterior.residual / (data.num_data - count)
        log_beta = noise.clip(-math.log(variance)) if noise.learned else posterior.log_beta
        new = _posterior(data, _updated(posterior, update), log_beta)
        return replace(self, posterior=new)

    def select(self, left: NDArray[np.bool_]) -> Self:
        data, before = self.data.select(left), self.posterior
        posterior = _posterior(data, before.log_alpha[left], before.log_beta)
        return replace(self, data=data, kept=self.kept[left], posterior=posterior)


@dataclass(frozen=True)
class _Logistic(_AbstractFit):
    search: LogisticSearch
    mode: LaplaceMode
    posterior: WeightPosterior

    @classmethod
    def at(cls, search: LogisticSearch, mode: LaplaceMode) -> Self:
        return cls(search, mode, as_regression(mode)[1])

    @property
    def log_evidence(self) -> float:
        return self.mode.log_evidence

    def updated(self, update: Update) -> Self:
        everything = np.arange(len(self.mode.indices))
        return self._moved(everything, _updated(self.posterior, update))

    def select(self, left: NDArray[np.bool_]) -> Self:
        kept = np.flatnonzero(left)
        return self._moved(kept, self.mode.log_alpha[kept])

    def _moved(self, kept: NDArray[np.intp], log_alpha: Array) -> Self:
        mode = self.search.moved(self.mode, kept, log_alpha, self.mode.mean[kept])
        return self.at(self.search, mode)


Fit = TypeVar("Fit", bound=_AbstractFit)


def _iterate(fit: Fit, update: Update, tol: float, max_iter: int) -> tuple[Fit, list[float], bool]:
    trace: list[float] = []
    for _ in range(max_iter):
        before = fit.log_evidence
        fit = fit.updated(update)
        scaled, _ = unit_free(fit.posterior)
        left = 1 - scaled.diagonal() > _LEAST_DETERMINED
        settled = abs(fit.log_evidence - before) < tol
        if settled:
            left &= relevant(fit.posterior)
        if not left.all():
            settled = False
            fit = fit.select(left)
        trace.append(fit.log_evidence)
        if settled:
            return fit, trace, True
    return fit, trace, False


def relevant(posterior: WeightPosterior) -> NDArray[np.bool_]:
    """Which basis functions stay when those with ``q^2 <= s`` are deleted, the worst first.

    Each deletion raises the evidence and changes the others' ``s`` and ``q``; the posterior is
    brought up to date by a change of rank one.
    """
    scaled, signal = unit_free(posterior)
    scaled = scaled.copy()
    left = np.ones(len(signal), dtype=bool)
    for _ in range(len(signal)):
        shrinkage, square = scaled.diagonal(), signal * signal
        irrelevant = left & (square <= shrinkage * (1 - shrinkage))
        if not irrelevant.any():
            break
        worst = int(np.where(irrelevant, deletion_gain(shrinkage, square), -np.inf).argmax())
        row = scaled[worst] / shrinkage[worst]
        signal = signal - row * signal[worst]
        scaled -= np.outer(row, row * shrinkage[worst])
        left[worst] = False
        scaled.flat[worst * (len(left) + 1)] = 1.0  # out of the way of the next division
    return left


def _posterior(data: Moments, log_alpha: Array, log_beta: float) -> WeightPosterior:
    posterior = weight_posterior(data, log_alpha, log_beta)
    if posterior is None:
        raise ArithmeticError(
            f"the posterior precision of {len(log_alpha)} weights is singular to rounding at noise "
            f"precision {math.exp(log_beta):.3g} (of a unit target).\n"
            '  Try method="fast", a larger min_noise or a kernel of a smaller reach.'
        )
    return posterior


def _updated(posterior: WeightPosterior, update: Update) -> Array:
    """Log precisions after an update, ``(m,)``; Tipping (2001), eq. 20 or 16."""
    scaled, signal = unit_free(posterior)
    shrinkage, square = scaled.diagonal(), signal * signal
    if update == "em":
        return np.asarray(posterior.log_alpha - np.log(square + shrinkage))
    # The tiny number stands for log 0: such a weight is dropped on the next round.
    return np.asarray(posterior.log_alpha + np.log((1 - shrinkage) / (square + 1e-300)))
