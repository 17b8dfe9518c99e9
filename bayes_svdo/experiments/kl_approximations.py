"""The KL to the log-uniform prior and its approximations, with their errors.

The exact curve needs no approximation any more (:mod:`bayes_svdo.distributions.special`), so the
error of those that networks have been trained with can be read off. Two further curves say how
good an approximation of the same kind could have been, and one belongs to another prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from torch import Tensor

from bayes_svdo.analysis.figures import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    TICK_SIZE,
    Array,
    Canvas,
    array,
    styled,
)
from bayes_svdo.distributions import kl_empirical_bayes, kl_log_uniform
from bayes_svdo.distributions.special import exact_kl, exact_kl_slope, softplus

# (Euler's constant + log 2)/2, of which the published k1 = 0.63576 is a Monte-Carlo estimate.
_EXACT_K1 = 0.63518142273073908501
# Our own minimax fits to the exact KL, each a sum of k1 sigmoid(-k2 - k3 log alpha).
_REFITTED = ((_EXACT_K1, 1.8399026, 1.4577357),)
_TWO_SIGMOIDS = (
    (0.4767925, 1.96031594, 1.73858879),
    (_EXACT_K1 - 0.4767925, 1.95749255, 1.09305461),
)

# In the order of the legend. Kingma et al.'s cubic holds for alpha <= 1 and is NaN beyond.
LABELS = {
    "kingma2015": "Kingma et al. 2015, α ≤ 1",
    "poster2016": "poster 2016",
    "molchanov2017": "Molchanov et al. 2017",
    "refitted": "the same form, refitted",
    "two_sigmoids": "two sigmoids",
    "empirical_bayes": "empirical Bayes (another prior)",
}
_COLOURS = dict(zip(LABELS, (PALETTE[3], ORANGE, BLUE, PALETTE[5], GREEN, GREY), strict=True))


@dataclass(frozen=True)
class KLApproximations:
    """KLs per weight in nats, normalised so that they vanish for alpha -> inf, and their slopes.

    Attributes:
        log_alpha: Where they were evaluated, (n,).
        exact: The exact KL, (n,).
        exact_slope: Its derivative by ``log_alpha``, (n,).
        kl: The others by name, each (n,); NaN where one does not hold.
        slope: Their derivatives, likewise.
    """

    log_alpha: Array
    exact: Array
    exact_slope: Array
    kl: dict[str, Array]
    slope: dict[str, Array]

    def error(self, name: str) -> Array:  # (n,)
        """``KL - exact KL`` in nats."""
        return self.kl[name] - self.exact

    def slope_error(self, name: str) -> Array:  # (n,)
        """``dKL/d log alpha - exact``: the error of the force on a weight's ``log_alpha``."""
        return self.slope[name] - self.exact_slope

    def rows(self) -> list[dict[str, float]]:
        """One row per ``log_alpha``, one column per KL and per slope; without what does not hold.

        Columns are named as in :attr:`kl`, slopes with ``_slope``.
        """
        columns = {"log_alpha": self.log_alpha, "exact": self.exact, **self.kl}
        columns |= {"exact_slope": self.exact_slope}
        columns |= {f"{name}_slope": slope for name, slope in self.slope.items()}
        return [
            {name: float(values[i]) for name, values in columns.items() if np.isfinite(values[i])}
            for i in range(len(self.log_alpha))
        ]


def kl_approximations(
    low: float = -10.0, high: float = 10.0, num_points: int = 801
) -> KLApproximations:
    """Evaluate the exact KL and every approximation on an even grid of ``log_alpha``, in float64.

    Args:
        low: Where the grid begins.
        high: Where it ends.
        num_points: How many points it has, at least 2.

    Raises:
        ValueError: The grid is empty or not finite.
    """
    if not (-np.inf < low < high < np.inf) or num_points < 2:
        raise ValueError(
            "the grid of log_alpha needs finite low < high and at least 2 points, got "
            f"low={low}, high={high}, num_points={num_points}."
        )
    grid = torch.linspace(low, high, num_points, dtype=torch.float64)
    kl, slope = {}, {}
    for name in LABELS:
        values, slopes = _with_slope(_FUNCTIONS[name], grid)
        holds = grid <= 0 if name == "kingma2015" else torch.ones_like(grid, dtype=torch.bool)
        kl[name] = array(values.where(holds, torch.nan))
        slope[name] = array(slopes.where(holds, torch.nan))
    return KLApproximations(
        array(grid), array(exact_kl(grid)), array(exact_kl_slope(grid)), kl, slope
    )


def plot_kl_approximations(
    result: KLApproximations | None = None, *, figure: Canvas | None = None
) -> Canvas:
    """Draw -KL, the errors of its approximations, and those of their slopes, against log alpha.

    Args:
        result: What to draw; computed with the defaults if None.
        figure: Where to draw; a new figure if None.

    Returns:
        The figure, with three panels. The KL of empirical Bayes is no approximation, so it is
        drawn in the first alone.
    """
    result = kl_approximations() if result is None else result
    with styled(figure, (10.0, 3.6)) as figure:
        axes = cast("list[Axes]", figure.subplots(1, 3).ravel().tolist())
        _draw_curves(axes[0], result)
        _draw_errors(axes[1], result, result.error, "error of KL (nats)", "KL − exact KL")
        _draw_errors(
            axes[2],
            result,
            result.slope_error,
            "error of dKL/d log α (nats)",
            "Slope − exact slope",
        )
        for ax in axes:
            ax.set_xlabel("log α")
            ax.set_xlim(result.log_alpha[0], result.log_alpha[-1])
            ax.tick_params(labelsize=TICK_SIZE)
        figure.legend(handles=_key(result), loc="outside lower center", ncols=4)
        figure.suptitle(
            "The KL to the log-uniform prior, and its approximations with largest errors (nats)",
            x=0.01,
            ha="left",
        )
    return figure


def _sigmoids(terms: tuple[tuple[float, float, float], ...]) -> Callable[[Tensor], Tensor]:
    def kl(log_alpha: Tensor) -> Tensor:
        steps = [k1 * torch.sigmoid(-k2 - k3 * log_alpha) for k1, k2, k3 in terms]
        return torch.stack(steps).sum(0) + 0.5 * softplus(-log_alpha)

    return kl


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "kingma2015": lambda x: kl_log_uniform(x, "kingma2015", extrapolate=True),
    "poster2016": lambda x: kl_log_uniform(x, "poster2016"),
    "molchanov2017": lambda x: kl_log_uniform(x, "molchanov2017"),
    "refitted": _sigmoids(_REFITTED),
    "two_sigmoids": _sigmoids(_TWO_SIGMOIDS),
    "empirical_bayes": kl_empirical_bayes,
}


def _with_slope(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    values = function(x)
    return values.detach(), torch.autograd.grad(values.sum(), x)[0]


def _draw_curves(ax: Axes, result: KLApproximations) -> None:
    ax.plot(result.log_alpha, -result.exact, color="black", lw=3.2)
    for index, (name, colour) in enumerate(_COLOURS.items()):
        # The eye cannot tell the approximations from the exact curve: they take turns on it.
        style = "-" if name == "empirical_bayes" else (3.0 * index, (3.0, 12.0))
        ax.plot(result.log_alpha, -result.kl[name], ls=style, color=colour)
    ax.set_ylabel("−KL (nats)")
    ax.set_title("−KL of one weight")


def _draw_errors(
    ax: Axes, result: KLApproximations, error: Callable[[str], Array], unit: str, title: str
) -> None:
    ax.axhline(0, color="black", lw=1)
    for name in LABELS:
        if name != "empirical_bayes":
            ax.plot(result.log_alpha, error(name), color=_COLOURS[name])
    ax.set_ylabel(unit)
    ax.set_title(title)


def _key(result: KLApproximations) -> list[Line2D]:
    """What each colour is, with the largest error of its KL."""
    key = [Line2D([], [], color="black", lw=3.2, label="exact")]
    for name, label in LABELS.items():
        if name != "empirical_bayes":
            label += f": {np.nanmax(np.abs(result.error(name))):.4f}"
        key.append(Line2D([], [], color=_COLOURS[name], label=label))
    return key
