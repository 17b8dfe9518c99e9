"""The variational posterior beside draws from the exact one, weight by weight."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bayes_svdo.analysis.draws import SiteDraws
from bayes_svdo.analysis.figures import Array, array, check_posterior
from bayes_svdo.analysis.nuts import NutsPosterior
from bayes_svdo.analysis.posterior_plots import _label, _names
from bayes_svdo.inference.posterior import Posterior

_INTERVAL = 0.95


@dataclass(frozen=True, eq=False)
class MarginalComparison:
    """One weight under ``q``, a Gaussian, and under the posterior that NUTS drew from.

    Attributes:
        site: Name of the site.
        place: Index of the weight in it.
        label: Where it is, in words.
        pruned: Whether ``log alpha`` is at or above the threshold. ``q`` is compared as it was
            fitted, not as pruned: a point mass only where the weight was pruned while training.
        q_mean: Mean under ``q``.
        q_sd: Standard deviation under ``q``.
        nuts_mean: Mean of the draws.
        nuts_sd: Their standard deviation.
        distance: 1-Wasserstein distance of the two marginals in units of ``nuts_sd``: 0 where they
            agree; 1 where, say, ``q`` lies one standard deviation beside it.
        inside: Part of the draws that lies in the central 95 % interval of ``q``: below 0.95 where
            ``q`` is too narrow or beside it, above where it is too wide.
    """

    site: str
    place: tuple[int, ...]
    label: str
    pruned: bool
    q_mean: float
    q_sd: float
    nuts_mean: float
    nuts_sd: float
    distance: float
    inside: float

    @property
    def shift(self) -> float:
        """``(q_mean - nuts_mean) / nuts_sd``."""
        return (self.q_mean - self.nuts_mean) / self.nuts_sd

    @property
    def sd_ratio(self) -> float:
        """``q_sd / nuts_sd``."""
        return self.q_sd / self.nuts_sd


@dataclass(frozen=True, eq=False)
class NutsComparison(Sequence[MarginalComparison]):
    """All weights, in the network's order; prints as a table.

    Attributes:
        weights: One entry per weight.
        threshold: On log alpha, for ``pruned``.
        trouble: What is wrong with the draws, in words, see
            :class:`~bayes_svdo.analysis.NutsPosterior`.
    """

    weights: tuple[MarginalComparison, ...]
    threshold: float
    trouble: str

    def __getitem__(self, index: int) -> MarginalComparison:  # type: ignore[override]
        return self.weights[index]

    def __len__(self) -> int:
        return len(self.weights)

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain numbers, for JSON."""
        return [
            {
                "site": each.site,
                "place": list(each.place),
                "label": each.label,
                "pruned": each.pruned,
                "q_mean": each.q_mean,
                "q_sd": each.q_sd,
                "nuts_mean": each.nuts_mean,
                "nuts_sd": each.nuts_sd,
                "distance": each.distance,
                "inside": each.inside,
            }
            for each in self
        ]

    def to_rich(self, title: str | None = None) -> Table:
        """The table for a terminal."""
        caption = f"distance: Wasserstein, in sds of NUTS; * log α >= {self.threshold:g}"
        if self.trouble:
            caption += f"\nbeware: {self.trouble}"
        table = Table(title=title, caption=caption, caption_justify="left")
        for heading in ("weight", "q: mean ± sd", "NUTS: mean ± sd", "distance", "in q's 95 %"):
            table.add_column(heading, justify="left" if heading == "weight" else "right")
        for each in self:
            table.add_row(
                each.label + ("*" if each.pruned else ""),
                f"{each.q_mean:.3f} ± {each.q_sd:.3f}",
                f"{each.nuts_mean:.3f} ± {each.nuts_sd:.3f}",
                f"{each.distance:.2f}",
                f"{100 * each.inside:.0f} %",
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None, force_jupyter=False)
        with console.capture() as capture:
            console.print(self.to_rich())
        return capture.get()


def compare_with_nuts(
    posterior: Posterior,
    nuts: NutsPosterior,
    *,
    threshold: float | None = None,
    input_names: Sequence[str] | None = None,
) -> NutsComparison:
    """Means, standard deviations and marginals of ``q`` beside those of the exact posterior.

    The two are posteriors under different priors: under the improper one that ``q`` was fitted
    with there is no exact posterior. Marginals are compared one at a time, so correlations, which
    ``q`` has none of, show only as widths.

    Args:
        posterior: The fitted one.
        nuts: What :func:`~bayes_svdo.analysis.nuts_posterior` drew for the same model.
        threshold: On log alpha, for the marks in the table; the posterior's own if None.
        input_names: Of the inputs of the first site, for the labels.

    Raises:
        TypeError: ``posterior`` is no Posterior, or ``nuts`` no NutsPosterior.
        ValueError: Their weights have other names or shapes, ``input_names`` does not fit, or all
            draws of a weight are equal.
    """
    check_posterior(posterior, "compare_with_nuts")
    sites = check_same_weights(posterior, nuts, posterior._threshold(threshold))
    names = _names(sites[0], input_names)
    found = []
    for site in sites:
        mean, sd, kept = (array(value).ravel() for value in (site.loc, site.sigma, site.kept))
        drawn = nuts.weights[site.name].reshape(len(nuts), -1)
        for index, draws in enumerate(drawn.T):
            place = tuple(map(int, np.unravel_index(index, site.shape)))
            if not draws.std() > 0:
                raise ValueError(
                    f'at site "{site.name}", all draws of weight {place} are {draws[0]:.3g}: the '
                    "chain did not move.\n  Try more warmup."
                )
            found.append(
                MarginalComparison(
                    site.name,
                    place,
                    _label(site, names if site is sites[0] else None, place),
                    not kept[index],
                    *(float(mean[index]), float(sd[index])),
                    *(float(draws.mean()), float(draws.std())),
                    *_differences(float(mean[index]), float(sd[index]), draws),
                )
            )
    return NutsComparison(tuple(found), posterior._threshold(threshold), nuts.trouble)


def check_same_weights(
    posterior: Posterior, nuts: object, threshold: float = math.inf
) -> tuple[SiteDraws, ...]:
    """The posterior's sites, if the draws are of the same."""
    if not isinstance(nuts, NutsPosterior):
        raise TypeError(
            "nuts must be a NutsPosterior, as nuts_posterior returns it, but is a "
            f"{type(nuts).__name__}."
        )
    sites = SiteDraws.of(posterior, threshold, surviving_only=False)
    mine = {site.name: site.shape for site in sites}
    theirs = {name: value.shape[1:] for name, value in nuts.weights.items()}
    if mine != theirs:
        raise ValueError(
            f"posterior and nuts must be of the same model, but have {_shown(mine)} and "
            f"{_shown(theirs)}."
        )
    return sites


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _differences(mean: float, sd: float, draws: Array) -> tuple[float, float]:
    """Wasserstein distance in sds of the draws, and the part of them in q's 95 % interval."""
    number = len(draws)
    levels = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    # In one dimension the optimal transport pairs quantiles.
    quantiles = mean + sd * array(torch.special.ndtri(levels))
    distance = np.abs(np.sort(draws) - quantiles).mean() / draws.std()
    half = sd * float(torch.special.ndtri(torch.tensor(0.5 + _INTERVAL / 2, dtype=torch.float64)))
    return float(distance), float((np.abs(draws - mean) <= half).mean())
