"""Search for the basis functions of a relevance vector machine: the fast algorithm.

Tipping and Faul (2003) climb the evidence by adding, re-estimating or deleting one basis function
at a time; the gain of each action is known in closed form from ``S`` and ``Q``. This search takes
the same actions in another order: after each addition the precisions that are in use and the noise
are re-estimated, and deleted, jointly (:mod:`~bayes_svdo.inference.rvm_evidence`), which needs no
pass over the data, and only then are ``S`` and ``Q`` computed for the basis functions outside.
Where nothing more enters, one in use is exchanged for one outside if that raises the evidence.

Memory is ``O(num_basis * m)`` for ``m`` basis functions that ever entered, and time
``O(num_data * num_basis)`` for each that enters plus ``O(num_basis m^2)`` a round; nothing is
cubic in the number of data. ``S`` and ``Q`` are computed afresh each round from inner products that
never change, so that no rounding accumulates.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bayes_svdo.inference.rvm_basis import DesignMatrix
from bayes_svdo.inference.rvm_evidence import (
    Array,
    Moments,
    NoiseRange,
    WeightPosterior,
    deletion_gain,
    maximise_evidence,
    weight_posterior,
)

Numbers: TypeAlias = Any
"""A tensor, or on the CPU an array: what is done here is short, and a call costs a third."""

# While there are few basis functions the best estimate of the noise is that all is noise, and under
# it none may be worth adding. So the first rounds hold on to the noise they began with.
_HOPEFUL_ROUNDS = 20

# Between additions the precisions need not be exact; at the end they are.
_LOOSE_TOL, _LOOSE_STEPS = 1e-2, 5
_TIGHT_STEPS = 200

# With m basis functions in use, 1 + m // _BATCH enter before the next re-estimation.
_BATCH = 16

# An exchange costs a pass over the data, and many small ones may follow each other.
_EXCHANGE_TOLS = 10

# So many candidates in a row whose promise the evidence does not keep end the search.
MOST_BROKEN_PROMISES = 5


def least_part(design: DesignMatrix) -> float:
    """Least part of a candidate's square that must lie outside the span of those in use.

    A candidate that lies in it up to rounding could only add noise.
    """
    return 32 * torch.finfo(design.norm.dtype).eps * math.sqrt(design.num_data)


def best_candidate(
    s: Numbers, q: Numbers, *, least: Numbers, barred: list[int]
) -> tuple[int, float]:
    """Candidate whose entry raises the log evidence most, and by how many nats.

    Tipping and Faul (2003), eq. 27, with the precision that maximises it, eq. 20.

    Args:
        s: ``(num_basis,)`` sparsity factors of basis functions not in use.
        q: ``(num_basis,)`` quality factors.
        least: Candidates with a smaller ``s`` are left out; a number, or one for each.
        barred: Indices that may not enter.
    """
    with np.errstate(all="ignore"):
        ratio = q * q / s
    ratio[~(s > least)] = 0.0
    ratio[barred] = 0.0
    # The gain rises with the ratio, so it is needed at the largest only.
    index = int(ratio.argmax())
    best = float(ratio[index])
    return index, 0.5 * (best - 1 - math.log(best)) if best > 1 else 0.0


class Exchange(NamedTuple):
    """One basis function that leaves for another."""

    leaves: int  # position, among those in use
    enters: int  # index
    log_alpha: float
    gain: float  # in log evidence, nats


def best_exchange(
    s: Numbers,
    q: Numbers,
    cross: Numbers,
    *,
    log_alpha: Array,
    mean: Array,
    variance: Array,
    least: Numbers,
    barred: list[int],
) -> Exchange | None:
    """The exchange that raises the log evidence most; None if nothing could enter.

    Neighbouring basis functions are nearly alike, and once one of them is in use the others have
    little to add: without exchanges the search could not move to a better neighbour.

    Args:
        s: As in :func:`best_candidate`, and so are ``q``, ``least`` and ``barred``.
        q: See ``s``.
        cross: ``(m, num_basis)`` posterior covariance of the weights in use, times the inner
            products of their basis functions with all others under the noise precision.
        log_alpha: ``(m,)``.
        mean: ``(m,)`` of the weights.
        variance: ``(m,)`` of the weights.
        least: See ``s``.
        barred: See ``s``.
    """
    best = None
    loss = deletion_gain(np.exp(log_alpha) * variance, np.exp(log_alpha) * mean**2)
    for position, row in enumerate(cross):
        v = float(variance[position])
        s_left, q_left = s + row * row / v, q + row * (float(mean[position]) / v)
        index, gain = best_candidate(s_left, q_left, least=least, barred=barred)
        total = gain + float(loss[position])
        if gain > 0 and (best is None or total > best.gain):  # else nothing is worth its place
            level = optimal_log_alpha(float(s_left[index]), float(q_left[index]))
            best = Exchange(position, index, level, total)
    return best


def optimal_log_alpha(s: float, q: float) -> float:
    """Log precision of the highest evidence, for ``q² > s``; Tipping and Faul (2003), eq. 20."""
    return math.log(s) - math.log(q * q / s - 1)


class ActiveSet:
    """The basis functions in use, and the inner products of all others with them.

    Args:
        design: All basis functions over the training data.
        targets: ``(num_data,)`` centred if there is an intercept.
        num_data: Number of data, less one where an intercept has been integrated out.
    """

    def __init__(self, design: DesignMatrix, targets: Tensor, num_data: int) -> None:
        self.design = design
        self.num_data = num_data
        self.energy = float(targets.double().square().sum())
        self.moment = design.project(targets.unsqueeze(1)).squeeze(1).double()  # (num_basis,)
        self.indices: list[int] = []
        self._barred: list[int] = []
        self._slots: dict[int, int] = {}
        # Row 0: with the targets. Row slot: with the basis function that has this slot.
        self._products = _light(self.moment.new_empty(32, design.num_basis))
        self._products[0] = _light(self.moment)
        self._least_part = least_part(design)

    def moments(self) -> Moments:
        """Of the basis functions in use, on the host."""
        products = self._with_moment(self.indices)
        found = products[:, self.indices]
        host: Array = found.cpu().numpy() if isinstance(found, Tensor) else found
        moment, gram = host[0], host[1:]
        # In float32 the two halves of a computed Gram matrix differ in their last digits.
        gram = 0.5 * (gram + gram.T)
        np.fill_diagonal(gram, 1.0)
        return Moments(
            gram=gram,
            moment=moment,
            energy=self.energy,
            num_data=self.num_data,
            rounding=torch.finfo(self.design.norm.dtype).eps,
        )

    def keep(self, positions: NDArray[np.intp]) -> None:
        """Drop the basis functions that are not at ``positions``; let every other enter again."""
        self.indices = [self.indices[i] for i in positions.tolist()]
        self._barred = []

    def withdraw(self, count: int) -> None:
        """Take the last ``count`` basis functions back, and do not try them again for now."""
        self._barred += self.indices[-count:]
        self.indices = self.indices[:-count]

    def add_all(self) -> None:
        """Take every basis function into use that is not constant."""
        self.indices = (~self.design.is_null).nonzero().squeeze(1).tolist()
        self._slots = {index: slot for slot, index in enumerate(self.indices, 1)}
        rows = self.design.rows(
            torch.tensor(self.indices, dtype=torch.long, device=self.moment.device)
        )
        products = self.design.project(rows.T).T.to(self.moment.dtype)
        self._products = _light(torch.cat([self.moment.unsqueeze(0), products]))

    def add_best(self, posterior: WeightPosterior, most: int, tol: float) -> list[float]:
        """Add up to ``most`` basis functions, each the one that raises the evidence most.

        Returns:
            Their optimal log precisions; empty when none raises the evidence by ``tol``.
        """
        beta = math.exp(posterior.log_beta)
        spanned, s, q = self._factors(posterior)
        least = self._least_part * beta
        log_alphas: list[float] = []
        while len(log_alphas) < most:
            best, gain = best_candidate(s, q, least=least, barred=self.indices + self._barred)
            if gain < tol:
                break
            # Those that enter together must be of comparable worth.
            tol = max(tol, 0.1 * gain)
            s_best, q_best = float(s[best]), float(q[best])
            log_alphas.append(optimal_log_alpha(s_best, q_best))
            alpha = math.exp(log_alphas[-1])
            self.indices.append(best)
            if len(log_alphas) == most:
                break
            # One more row of the Cholesky factor, and what it takes from every candidate.
            row = beta * self._rows([best])[0] - spanned[:, best] @ spanned
            row /= math.sqrt(alpha + s_best)
            spanned = _stacked([spanned, row[None]])
            q -= row * (q_best / math.sqrt(alpha + s_best))
            s -= row * row
        return log_alphas

    def best_exchange(self, posterior: WeightPosterior) -> Exchange | None:
        """The exchange that raises the evidence most."""
        spanned, s, q = self._factors(posterior)
        whitener: Numbers = posterior.whitener
        if isinstance(spanned, Tensor):
            whitener = torch.from_numpy(whitener).to(spanned.device)
        return best_exchange(
            s,
            q,
            whitener.T @ spanned,
            log_alpha=posterior.log_alpha,
            mean=posterior.mean,
            variance=posterior.covariance.diagonal(),
            least=self._least_part * math.exp(posterior.log_beta),
            barred=self.indices,
        )

    def exchange(self, position: int, index: int) -> None:
        """Put ``index`` in the place of the basis function at ``position``."""
        self.indices[position] = index

    def _factors(self, posterior: WeightPosterior) -> tuple[Numbers, Numbers, Numbers]:
        """The whitened products with all basis functions, ``(m, num_basis)``, and S and Q."""
        beta = math.exp(posterior.log_beta)
        # One product for what S and Q need: the whitened rows, and the moment that is left.
        size = len(self.indices)
        combine: Numbers = np.zeros((size + 1, size + 1))
        combine[:size, 1:] = beta * posterior.whitener
        combine[size, 0] = beta
        combine[size, 1:] = -beta * posterior.mean
        products = self._with_moment(self.indices)
        if isinstance(products, Tensor):
            combine = torch.from_numpy(combine).to(products.device)
        combined = combine @ products
        spanned, q = combined[:size], combined[size]
        return spanned, beta - (spanned * spanned).sum(0), q

    def _rows(self, indices: list[int]) -> Numbers:  # -> (len(indices), num_basis)
        """Inner products of ``indices`` with all basis functions, kept once computed."""
        return self._with_moment(indices)[1:]

    def _with_moment(self, indices: list[int]) -> Numbers:  # -> (1 + len(indices), num_basis)
        """The moment of all basis functions, then their inner products with ``indices``."""
        for index in indices:
            if index not in self._slots:
                self._compute(index)
        return self._products[[0, *(self._slots[i] for i in indices)]]

    def _compute(self, index: int) -> None:
        slot = 1 + len(self._slots)
        if slot == len(self._products):
            self._products = _stacked([self._products, self._products])  # room for as many
        row = self.design.rows(torch.tensor([index], device=self.moment.device))
        self._products[slot] = _light(self.design.project(row.T)[:, 0])
        self._slots[index] = slot


def _light(values: Tensor) -> Numbers:
    return values.numpy() if values.device.type == "cpu" else values


def _stacked(parts: list[Numbers]) -> Numbers:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else np.concatenate(parts)


def search(
    active: ActiveSet, noise: NoiseRange, log_beta: float, *, tol: float, max_iter: int
) -> tuple[WeightPosterior, list[float], bool]:
    """Climb the evidence from the empty model until no action raises it by ``tol`` nats.

    Args:
        active: Empty.
        noise: Range of the noise precision.
        log_beta: Log noise precision to begin with. One that is learned should be optimistic.
        tol: Least gain, in nats.
        max_iter: Most rounds.

    Returns:
        The posterior of the basis functions that ``active`` then holds, the log evidence after
        each round, and whether the search came to its end within ``max_iter`` rounds.
    """
    posterior = weight_posterior(active.moments(), np.empty(0), log_beta)
    assert posterior is not None
    trace: list[float] = []
    settled, held, broken = False, noise.learned, 0
    while len(trace) < max_iter:
        most = 1 + len(active.indices) // _BATCH
        new = active.add_best(posterior, most, tol) if broken < MOST_BROKEN_PROMISES else []
        if not new and settled:
            exchanged = _exchanged(active, posterior, tol)
            if exchanged is None:
                return posterior, trace, True
            posterior, settled = exchanged, False
        data, start = active.moments(), posterior
        if new:
            grown = weight_posterior(data, np.append(start.log_alpha, new), start.log_beta)
            # The gain was exact: where it is not kept, all that it promised was rounding.
            if grown is None or grown.log_evidence < start.log_evidence + 0.5 * tol:
                active.withdraw(len(new))
                broken += 1
                continue
            start = grown
        settled, broken = not new, 0
        held = held and bool(new) and len(trace) < _HOPEFUL_ROUNDS
        kept, posterior = maximise_evidence(
            data,
            start,
            replace(noise, learned=noise.learned and not held),
            tol=1e-6 * tol if settled else _LOOSE_TOL,
            max_steps=_TIGHT_STEPS if settled else _LOOSE_STEPS,
        )
        active.keep(kept)
        trace.append(posterior.log_evidence)
    return posterior, trace, False


def _exchanged(active: ActiveSet, posterior: WeightPosterior, tol: float) -> WeightPosterior | None:
    """The posterior after the best exchange; None if it is not worth it."""
    best = active.best_exchange(posterior)
    if best is None or best.gain < _EXCHANGE_TOLS * tol:
        return None
    before = active.indices[best.leaves]
    log_alpha = posterior.log_alpha.copy()
    log_alpha[best.leaves] = best.log_alpha
    active.exchange(best.leaves, best.enters)
    new = weight_posterior(active.moments(), log_alpha, posterior.log_beta)
    # As with those that enter: what the evidence does not keep was rounding.
    if new is not None and new.log_evidence >= posterior.log_evidence + 0.5 * tol:
        return new
    active.exchange(best.leaves, before)
    return None
