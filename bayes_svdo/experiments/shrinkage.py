"""Relevance and shrinkage of VD-ARD beside the RVM and L1, as functions of a weight's z-score.

In an orthogonal design every weight stands for itself, and all that a method can do with it is a
function of ``z``, its least-squares estimate in standard errors. All of them set it to zero where
``|z| <= 1`` and shrink it beyond, the L1 penalty being chosen so that it does the same:

- **VD-ARD**: ``1 / (1 + alpha)`` with ``alpha`` the noise of the posterior that maximises
  ``z²/(2 (1 + alpha)) - KL(alpha)``; see :mod:`bayes_svdo.inference.exact_regression_curves`.
- **RVM**: the prior ``N(0, 1/a)`` whose ``a`` maximises the evidence (Tipping and Faul, 2003):
  ``1 - 1/z²``. VD-ARD with the KL of ``empirical_bayes`` is the same estimator.
- **L1**: ``1 - 1/|z|``, the soft threshold.

With ``kl_weight`` other than 1, VD-ARD's curves hold with ``z/sqrt(kl_weight)`` in place of ``z``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from matplotlib.axes import Axes

from bayes_svdo.analysis.figures import BLUE, GREEN, GREY, ORANGE, TICK_SIZE, Array, Canvas, styled
from bayes_svdo.inference.exact_regression_curves import KL, optimal_log_alpha

LABELS = {
    "vd_ard": "VD-ARD",
    "rvm": "RVM = empirical Bayes",
    "l1": "L1",
}
_COLOURS = {"vd_ard": BLUE, "rvm": ORANGE, "l1": GREEN}
# The threshold of the papers: prune where log alpha is at least this.
_USUAL_THRESHOLD = 3.0
# Nodes and half-width, in standard errors, of the integral over z.
_NUM_NODES, _HALF_WIDTH = 4001, 9.0


@dataclass(frozen=True)
class Shrinkage:
    """What becomes of a weight whose least-squares estimate is ``z`` standard errors.

    Attributes:
        z: Where the curves were evaluated, (n,), not negative.
        factor: By method, the estimate over the least-squares estimate, (n,); 0 where pruned.
        log_alpha: By method with ARD, log of the noise-to-signal ratio of the posterior (VD-ARD),
            log of the prior's precision in units of the squared inverse standard error (RVM), (n,);
            inf where pruned.
        effect: True effects in standard errors at which the risk was evaluated, (m,).
        risk: By method, expected squared error at ``effect`` in squared standard errors, (m,).
            That of least squares is 1.
    """

    z: Array
    factor: dict[str, Array]
    log_alpha: dict[str, Array]
    effect: Array
    risk: dict[str, Array]

    def pull(self, name: str) -> Array:  # (n,)
        """How far a method moves the estimate towards 0, in standard errors."""
        return self.z * (1 - self.factor[name])

    def rows(self) -> list[dict[str, float]]:
        """One row per ``z`` with factors and ``log_alpha``, then one per ``effect`` with risks."""
        curves = {f"factor_{name}": values for name, values in self.factor.items()}
        curves |= {f"log_alpha_{name}": values for name, values in self.log_alpha.items()}
        risks = {f"risk_{name}": values for name, values in self.risk.items()}
        return [
            {"z": float(z), **{name: float(values[i]) for name, values in curves.items()}}
            for i, z in enumerate(self.z)
        ] + [
            {"effect": float(effect), **{name: float(values[i]) for name, values in risks.items()}}
            for i, effect in enumerate(self.effect)
        ]


def shrinkage_factor(z: Array, method: str) -> Array:  # (*shape) -> (*shape)
    """The estimate over the least-squares estimate; 0 where ``|z| <= 1``.

    Args:
        z: Least-squares estimates in standard errors.
        method: ``"vd_ard"``, ``"rvm"`` or ``"l1"``.

    Raises:
        KeyError: Unknown ``method``.
    """
    size = np.abs(np.asarray(z, dtype=np.float64))
    with np.errstate(divide="ignore"):
        return {
            "vd_ard": lambda: 1 / (1 + np.exp(_log_alpha(size, "exact"))),
            "rvm": lambda: np.maximum(0.0, 1 - 1 / size**2),
            "l1": lambda: np.maximum(0.0, 1 - 1 / size),
        }[method]()


def shrinkage(high: float = 5.0, num_points: int = 501) -> Shrinkage:
    """Evaluate the curves for ``z`` and true effects between 0 and ``high``.

    Args:
        high: Largest ``z`` and largest effect, above 1: up to there all weights are pruned.
        num_points: How many of each, at least 2; ``z`` has more just above 1.

    Raises:
        ValueError: ``high`` or ``num_points`` is out of range.
    """
    if not 1 < high < math.inf or num_points < 2:
        raise ValueError(
            "high must be finite and above 1, where weights begin to be kept, and num_points at "
            f"least 2, got high={high}, num_points={num_points}."
        )
    even = np.linspace(0.0, high, num_points)
    # log alpha goes up to infinity just above the threshold.
    z = np.union1d(even, 1 + np.geomspace(1e-4, min(0.1, high - 1), 60))
    return Shrinkage(
        z=z,
        factor={name: shrinkage_factor(z, name) for name in LABELS},
        log_alpha={"vd_ard": _log_alpha(z, "exact"), "rvm": _log_alpha(z, "empirical_bayes")},
        effect=even,
        risk={name: _risk(even, name) for name in LABELS},
    )


def plot_shrinkage(result: Shrinkage | None = None, *, figure: Canvas | None = None) -> Canvas:
    """Draw shrinkage, pull towards zero, log alpha and risk of the methods, side by side.

    Args:
        result: What to draw; computed with the defaults if None.
        figure: Where to draw; a new figure if None.

    Returns:
        The figure, with four panels.
    """
    result = shrinkage() if result is None else result
    with styled(figure, (7.6, 6.0)) as figure:
        axes = cast("list[Axes]", figure.subplots(2, 2).ravel().tolist())
        _draw_factor(axes[0], result)
        _draw_pull(axes[1], result)
        _draw_log_alpha(axes[2], result)
        _draw_risk(axes[3], result)
        for ax in axes:
            ax.tick_params(labelsize=TICK_SIZE)
            ax.set_xlim(0, result.z[-1])
            if ax is not axes[3]:
                ax.axvspan(0, 1, color="0.95", zorder=0)
                ax.set_xlabel("|z|: estimate in standard errors (s.e.)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.suptitle(
            "All prune where |z| ≤ 1 (grey). VD-ARD shrinks like L1 near it, like the RVM far away",
            x=0.01,
            ha="left",
        )
    return figure


def _log_alpha(z: Array, kl: KL) -> Array:
    return np.asarray(optimal_log_alpha(torch.as_tensor(z).square(), kl).numpy())


def _risk(effect: Array, method: str) -> Array:  # (m,) -> (m,)
    """``E (estimate - effect)²`` over ``z ~ N(effect, 1)``, by the trapezoidal rule."""
    z = np.linspace(effect.min() - _HALF_WIDTH, effect.max() + _HALF_WIDTH, _NUM_NODES)
    density = np.exp(-0.5 * (z - effect[:, None]) ** 2)
    density /= density.sum(-1, keepdims=True)
    error = (z * shrinkage_factor(z, method) - effect[:, None]) ** 2
    return np.asarray((density * error).sum(-1))


def _draw_factor(ax: Axes, result: Shrinkage) -> None:
    for name, label in LABELS.items():
        ax.plot(result.z, result.factor[name], color=_COLOURS[name], label=label)
    ax.axhline(1, color=GREY, lw=1, ls="--", label="least squares")
    ax.set(ylim=(-0.02, 1.05), ylabel="share of the estimate kept", title="Shrinkage")


def _draw_pull(ax: Axes, result: Shrinkage) -> None:
    for name in LABELS:
        ax.plot(result.z, result.pull(name), color=_COLOURS[name])
    ax.axhline(0, color=GREY, lw=1, ls="--")
    ax.set(ylim=(-0.05, 1.1), ylabel="pull (s.e.)", title="Pull towards zero")


def _draw_log_alpha(ax: Axes, result: Shrinkage) -> None:
    for name, log_alpha in result.log_alpha.items():
        ax.plot(result.z, log_alpha, color=_COLOURS[name])
    ax.axhline(_USUAL_THRESHOLD, color="black", lw=1, ls="--")
    ax.annotate(
        "the papers prune above log α = 3",
        (result.z[-1], _USUAL_THRESHOLD),
        (0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=TICK_SIZE,
    )
    ax.annotate("pruned: ∞", (0.5, 6.0), ha="center", fontsize=TICK_SIZE)
    ax.set(ylim=(-4, 7), ylabel="log α", title="Relevance: noise of q, or precision of the prior")


def _draw_risk(ax: Axes, result: Shrinkage) -> None:
    for name in LABELS:
        ax.plot(result.effect, result.risk[name], color=_COLOURS[name])
    ax.axhline(1, color=GREY, lw=1, ls="--")
    ax.set(
        ylim=(0, None),
        xlabel="true effect in standard errors (s.e.)",
        ylabel="mean squared error (s.e.²)",
        title="What it costs, and saves",
    )
