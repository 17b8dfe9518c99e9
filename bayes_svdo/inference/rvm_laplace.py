"""Laplace's approximation for a logistic likelihood, and the search of basis functions under it.

At the mode of the weights the likelihood is as good as that of a regression with targets of
precision ``p (1 - p)`` each (Tipping, 2001, section 3; Tipping and Faul, 2003, section 4), so the
precisions are re-estimated by the same Newton steps, :mod:`~.rvm_evidence`, and the mode is found
again, in turns. The intercept has a flat prior; taking every basis function about its mean under
those precisions makes it independent of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from bayes_svdo.inference.rvm_basis import DesignMatrix
from bayes_svdo.inference.rvm_evidence import (
    Array,
    Moments,
    NoiseRange,
    WeightPosterior,
    maximise_evidence,
    weight_posterior,
)
from bayes_svdo.inference.rvm_search import MOST_BROKEN_PROMISES, best_candidate, least_part

_NO_NOISE = NoiseRange(learned=False, log_beta_max=math.inf)
_MOST_HALVINGS = 30
_MODE_TOL = 1e-10  # nats; Newton's convergence is quadratic, so the mode is exact by then

# Turns of precisions and mode, until no log precision moves by more than the tolerance.
_TURNS = 100
_LOOSE_TOL, _TIGHT_TOL = 1e-1, 1e-5


@dataclass(frozen=True)
class Expansion:
    """The log likelihood to second order, in the weights and the intercept.

    Attributes:
        residual: ``(num_data,)`` targets less probabilities.
        precision: ``(num_data,)`` ``p (1 - p)``.
        total: Sum of ``precision``.
        phi_mean: ``(m,)`` mean of the basis functions under ``precision`` (0 without an intercept).
        gram: ``(m, m)`` their inner products about that mean under ``precision``.
        slope: ``(m,)`` gradient in the weights.
        level_slope: Gradient in the intercept (0 without one).
    """

    residual: Tensor
    precision: Tensor
    total: float
    phi_mean: Array
    gram: Array
    slope: Array
    level_slope: float


@dataclass(frozen=True)
class LaplaceMode:
    """The weights' posterior at its mode, for fixed precisions.

    Attributes:
        indices: The ``m`` basis functions in use.
        phi: ``(m, num_data)`` their values, centred and scaled, float64.
        log_alpha: ``(m,)``.
        mean: ``(m,)`` weights at the mode.
        intercept: Intercept at the mode.
        at: Expansion there.
        covariance: ``(m, m)`` inverse of ``at.gram + diag(alpha)``.
        whitener: ``(m, m)`` inverse of its lower Cholesky factor.
        log_evidence: Laplace's approximation, in nats.
    """

    indices: list[int]
    phi: Tensor
    log_alpha: Array
    mean: Array
    intercept: float
    at: Expansion
    covariance: Array
    whitener: Array
    log_evidence: float


class LogisticSearch:
    """Search of basis functions for targets of 0 and 1.

    Args:
        design: All basis functions over the training data; centred if there is an intercept.
        targets: ``(num_data,)`` of 0 and 1, float64.
    """

    def __init__(self, design: DesignMatrix, targets: Tensor) -> None:
        self.design = design
        self.targets = targets
        self._sign = 2 * targets - 1

    def run(self, *, tol: float, max_iter: int) -> tuple[LaplaceMode, list[float], bool]:
        """Add, re-estimate and delete until nothing raises the log evidence by ``tol`` nats.

        A candidate is chosen by the gain that the expansion at the present mode promises. If the
        evidence at the new mode has not risen, the step is taken back.

        Returns:
            The mode, the log evidence after each round, and whether the search ended by itself.
        """
        best = self.empty()
        at_rest: LaplaceMode | None = None
        trace: list[float] = []
        broken: list[int] = []
        settled = False
        while len(trace) < max_iter:
            candidate = self._candidate(best, broken, tol)
            if candidate is None or len(broken) == MOST_BROKEN_PROMISES:
                if settled:
                    return best, trace, True
                best, settled, broken = self._reestimate(best, _TIGHT_TOL), True, []
                if at_rest and best.log_evidence < at_rest.log_evidence + tol:
                    # The fixed point is not the maximum: what the additions since then have gained
                    # may be lost on the way to it, and they would be made again and again.
                    return at_rest, [*trace, at_rest.log_evidence], True
                at_rest = best
            else:
                new = self._reestimate(self._with(best, *candidate), _LOOSE_TOL)
                if new.log_evidence <= best.log_evidence:
                    broken.append(candidate[0])
                    continue
                best, settled, broken = new, False, []
            trace.append(best.log_evidence)
        return best, trace, False

    def empty(self) -> LaplaceMode:
        """The mode without basis functions."""
        share = float(self.targets.mean())
        intercept = math.log(share / (1 - share)) if self.design.centred else 0.0
        none = self.targets.new_empty(0, len(self.targets))
        return self.mode([], none, np.empty(0), np.empty(0), intercept)

    def _candidate(
        self, mode: LaplaceMode, barred: list[int], tol: float
    ) -> tuple[int, float] | None:
        """Index and log precision of the best basis function to add."""
        at, dtype = mode.at, self.design.norm.dtype
        columns = torch.cat([at.residual[None], at.precision[None], mode.phi * at.precision])
        products = self.design.project(columns.T.to(dtype)).T.double()
        q, overlap, cross = products[0], products[1], products[2:]
        square = self.design.project_squares(at.precision.to(dtype)).double()
        s = square
        if self.design.centred:
            cross = cross - torch.outer(self._to(at.phi_mean), overlap)
            s = s - overlap.square() / at.total
        s = s - (self._to(mode.whitener) @ cross).square().sum(0)
        index, gain = best_candidate(
            s, q, least=least_part(self.design) * square, barred=mode.indices + barred
        )
        if gain < tol:
            return None
        s_best = float(s[index])
        return index, math.log(s_best) - math.log(float(q[index]) ** 2 / s_best - 1)

    def _with(self, mode: LaplaceMode, index: int, log_alpha: float) -> LaplaceMode:
        """The mode with one more basis function."""
        row = self.design.rows(torch.tensor([index], device=mode.phi.device)).double()
        return self.mode(
            [*mode.indices, index],
            torch.cat([mode.phi, row]),
            np.append(mode.log_alpha, log_alpha),
            np.append(mode.mean, 0.0),
            mode.intercept,
        )

    def _reestimate(self, mode: LaplaceMode, tol: float) -> LaplaceMode:
        """Precisions and mode in turns, to a fixed point.

        As in every relevance vector machine so far, the precisions are re-estimated as if the
        expansion did not move with them. The fixed point is therefore not quite the maximum of
        Laplace's approximation.
        """
        for _ in range(_TURNS):
            if not mode.indices:
                break
            data, start = as_regression(mode)
            kept, new = maximise_evidence(data, start, _NO_NOISE, tol=1e-3 * tol, max_steps=2)
            change = np.abs(new.log_alpha - mode.log_alpha[kept]).max(initial=0.0)
            done = len(kept) == len(mode.indices) and change < tol
            mode = self.moved(mode, kept, new.log_alpha, new.mean)
            if done:
                break
        return mode

    def moved(
        self, mode: LaplaceMode, kept: NDArray[np.intp], log_alpha: Array, mean: Array
    ) -> LaplaceMode:
        """The mode under other precisions, of the basis functions at the positions ``kept``."""
        return self.mode(
            [mode.indices[i] for i in kept],
            mode.phi[torch.from_numpy(kept).to(mode.phi.device)],
            log_alpha,
            mean,
            mode.intercept,
        )

    def mode(
        self, indices: list[int], phi: Tensor, log_alpha: Array, mean: Array, intercept: float
    ) -> LaplaceMode:
        """Newton's method from ``mean`` and ``intercept``.

        Args:
            indices: The ``m`` basis functions in use.
            phi: ``(m, num_data)`` their values, as in :class:`LaplaceMode`.
            log_alpha: ``(m,)``.
            mean: ``(m,)``.
            intercept: Stays as it is in a design that is not centred.

        Raises:
            ArithmeticError: The posterior precision is singular to rounding.
        """
        alpha = np.exp(log_alpha)
        height = self._height(phi, alpha, mean, intercept)
        while True:
            at = self._expansion(phi, mean, intercept)
            slope = at.slope - alpha * mean
            data = Moments(at.gram, slope - at.phi_mean * at.level_slope, 0.0, 0)
            step = weight_posterior(data, log_alpha, 0.0)
            if step is None:
                raise _singular(len(indices))
            rise = at.level_slope / at.total - float(at.phi_mean @ step.mean)
            if not self.design.centred:
                rise = 0.0
            promised = 0.5 * float(slope @ step.mean + at.level_slope * rise)
            if promised < _MODE_TOL:
                break
            # The log posterior is concave, so some fraction of the step rises, until rounding.
            for fraction in 0.5 ** np.arange(_MOST_HALVINGS):
                moved = mean + fraction * step.mean, intercept + float(fraction) * rise
                new_height = self._height(phi, alpha, *moved)
                if new_height > height:
                    break
            else:
                break
            (mean, intercept), height = moved, new_height
        evidence = height + 0.5 * log_alpha.sum() + np.log(step.whitener.diagonal()).sum()
        if self.design.centred:
            evidence += 0.5 * math.log(2 * math.pi / at.total)
        return LaplaceMode(
            indices=indices,
            phi=phi,
            log_alpha=log_alpha,
            mean=mean,
            intercept=intercept,
            at=at,
            covariance=step.covariance,
            whitener=step.whitener,
            log_evidence=float(evidence),
        )

    def _expansion(self, phi: Tensor, mean: Array, intercept: float) -> Expansion:
        latent = self._to(mean) @ phi + intercept
        # Tails, not differences from 1: those have no digits left once p rounds to 1.
        residual = self._sign * torch.sigmoid(-self._sign * latent)
        precision = torch.sigmoid(latent) * torch.sigmoid(-latent)
        weighted = phi * precision
        total = float(precision.sum())
        phi_mean, gram = np.zeros(len(mean)), _host(weighted @ phi.T)
        if self.design.centred:
            phi_mean = _host(weighted.sum(1)) / total
            gram = gram - total * np.outer(phi_mean, phi_mean)
        return Expansion(
            residual=residual,
            precision=precision,
            total=total,
            phi_mean=phi_mean,
            gram=gram,
            slope=_host(phi @ residual),
            level_slope=float(residual.sum()) if self.design.centred else 0.0,
        )

    def _height(self, phi: Tensor, alpha: Array, mean: Array, intercept: float) -> float:
        """Log posterior of the weights, up to the constant of the prior."""
        latent = self._to(mean) @ phi + intercept
        return float(logsigmoid(self._sign * latent).sum()) - 0.5 * float(alpha @ (mean * mean))

    def _to(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self.targets.device)


def as_regression(mode: LaplaceMode) -> tuple[Moments, WeightPosterior]:
    """A regression of noise precision 1 whose weights have the same posterior as ``mode``.

    Raises:
        ArithmeticError: The posterior precision is singular to rounding.
    """
    pull = mode.at.gram @ mode.mean + np.exp(mode.log_alpha) * mode.mean
    data = Moments(gram=mode.at.gram, moment=pull, energy=0.0, num_data=0)
    posterior = weight_posterior(data, mode.log_alpha, 0.0)
    if posterior is None:
        raise _singular(len(mode.indices))
    return data, posterior


def _host(values: Tensor) -> Array:
    array: Array = values.cpu().numpy()
    return array


def _singular(num_weights: int) -> ArithmeticError:
    return ArithmeticError(
        f"the posterior precision of {num_weights} weights is singular to rounding.\n"
        "  Try standardised inputs, or a kernel of a smaller reach."
    )
