"""Simulation-based calibration: does a posterior cover the truths that its own prior drew?

Draw weights from the prior, data from the model at these weights, and weights from the posterior
given the data: the rank of the truth among the draws is then uniform, for every weight, if the
posterior is exact (Cook, Gelman & Rubin (2006), https://doi.org/10.1198/106186006X136976; Talts et
al. (2018), https://arxiv.org/abs/1804.06788). It needs a proper prior to draw from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bayes_svdo.analysis.figures import Array, array
from bayes_svdo.analysis.predictives import check_probability
from bayes_svdo.inference.arguments import check_count, check_seed
from bayes_svdo.inference.inputs import as_tensor
from bayes_svdo.inference.surroundings import random_state

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class SimulatedCalibration:
    """Ranks of true weights among draws from the posteriors given their data.

    Attributes:
        ranks: How many draws lie below the truth, ``0..num_draws``, ties at random; shape
            ``(repetitions, weights)``.
        num_draws: Draws per repetition.
    """

    ranks: NDArray[np.int64]
    num_draws: int

    def __repr__(self) -> str:
        repetitions, weights = self.ranks.shape
        return (
            f"SimulatedCalibration({repetitions} repetitions, {weights} weights, {self.num_draws} "
            f"draws; {self.coverage(0.5):.0%} of the truths in 50 % intervals, "
            f"{self.coverage(0.95):.0%} in 95 %)"
        )

    def coverage(self, level: float) -> float:
        """Part of the truths that lie in the central interval of ``level``, 0 to 1.

        The interval holds the middle ranks. It has exactly this coverage if ranks are uniform and
        ``level * (num_draws + 1)`` is a whole number.

        Raises:
            ValueError: ``level`` is not in (0, 1).
        """
        return float(self._inside(level).mean())

    def coverage_error(self, level: float) -> float:
        """Standard error of :meth:`coverage`; the weights of one repetition are not independent.

        NaN for a single repetition.

        Raises:
            ValueError: ``level`` is not in (0, 1).
        """
        parts = self._inside(level).mean(1)
        if len(parts) < 2:
            return float("nan")
        return float(parts.std(ddof=1) / np.sqrt(len(parts)))

    def pvalues(self, bins: int = 10) -> Array:
        """Chi-square test that ranks are uniform, for every weight; shape ``(weights,)``.

        For the p-values to be good there should be 5 or more repetitions per bin.

        Raises:
            ValueError: ``bins`` is below 2 or above ``num_draws + 1``.
        """
        counts = np.stack([self.histogram(bins, weight) for weight in range(self.ranks.shape[1])])
        expected = len(self.ranks) * self._sizes(bins) / (self.num_draws + 1)
        statistic = torch.from_numpy(((counts - expected) ** 2 / expected).sum(1))
        half_df = torch.tensor(0.5 * (bins - 1), dtype=torch.float64)
        return array(torch.special.gammaincc(half_df, 0.5 * statistic))

    def histogram(self, bins: int = 10, weight: int | None = None) -> NDArray[np.int64]:
        """Number of ranks in each of ``bins`` equal parts, of one weight or of all.

        Raises:
            ValueError: ``bins`` is below 2 or above ``num_draws + 1``.
        """
        ranks = self.ranks if weight is None else self.ranks[:, weight]
        edges = np.concatenate([[0], np.cumsum(self._sizes(bins))])
        return np.histogram(ranks, edges - 0.5)[0].astype(np.int64)

    def _sizes(self, bins: int) -> NDArray[np.int64]:
        """How many of the possible ranks belong to each bin."""
        if not 2 <= check_count("bins", bins) <= self.num_draws + 1:
            raise ValueError(f"bins must lie in 2..{self.num_draws + 1}, but is {bins}.")
        edges = np.round(np.linspace(0, self.num_draws + 1, bins + 1)).astype(np.int64)
        return np.diff(edges)

    def _inside(self, level: float) -> NDArray[np.bool_]:
        level = check_probability("level", level)
        middle = 0.5 * self.num_draws
        inside: NDArray[np.bool_] = (
            np.abs(self.ranks - middle) < 0.5 * level * (self.num_draws + 1) - 1e-9
        )
        return inside


def simulation_based_calibration(
    simulate: Callable[[], tuple[Any, Any]],
    infer: Callable[[Any], Any],
    repetitions: int = 100,
    *,
    seed: int | None = None,
) -> SimulatedCalibration:
    """Ranks of simulated truths among posterior draws.

    Args:
        simulate: Gives weights drawn from the prior, shape ``(n,)``, and data drawn at them.
        infer: Draws from the posterior given such data, shape ``(draws, n)``: always the same
            number, independent of each other (thin a Markov chain).
        repetitions: How many data sets; each costs a call of both.
        seed: For torch's random numbers, all repetitions from one stream; the global state stays
            as it was. None continues the global stream.

    Returns:
        The ranks. A U-shaped histogram says that the posterior is too narrow, a dome that it is too
        wide, a slope that it is biased. A posterior that is a point mass beside the truth has its
        rank at an end; where both are equal, anywhere.

    Raises:
        ValueError: ``repetitions`` is below 1, shapes do not fit, or a value is not finite.
    """
    repetitions, seed = check_count("repetitions", repetitions), check_seed(seed)
    ranks: list[NDArray[np.int64]] = []
    num_draws = None
    with random_state(seed, _CPU):
        for _ in range(repetitions):
            truth, data = simulate()
            true = array(as_tensor(truth, "the truth"))
            draws = array(as_tensor(infer(data), "the draws"))
            if true.ndim != 1 or draws.ndim != 2 or draws.shape[1:] != true.shape:
                raise ValueError(
                    "simulate must give weights of shape (n,) and infer draws of shape (draws, n), "
                    f"but they gave {true.shape} and {draws.shape}."
                )
            if num_draws is not None and len(draws) != num_draws:
                raise ValueError(
                    f"infer must always give the same number of draws, but gave {num_draws}, then "
                    f"{len(draws)}."
                )
            num_draws = len(draws)
            ties = (draws == true).sum(0)
            at_random = np.floor(torch.rand(len(true)).double().numpy() * (ties + 1))
            ranks.append(((draws < true).sum(0) + at_random).astype(np.int64))
    assert num_draws is not None
    return SimulatedCalibration(np.stack(ranks), num_draws)
