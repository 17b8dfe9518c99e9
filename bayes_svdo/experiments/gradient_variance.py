"""Variance of the gradients of the expected log-likelihood, by how the noise is written down.

A Gaussian weight is ``loc (1 + sqrt(alpha) eps)`` (multiplicative noise, parameters ``loc`` and
``alpha``) or ``loc + sigma eps`` (additive, ``loc`` and ``sigma``). The distribution is the same,
the gradient by ``loc`` is not, since other things are held fixed; by the chain rule, for one draw
of the noise::

    d/d loc |alpha  =  d/d loc |sigma  +  (2 / loc) d/d log sigma²
    d/d log alpha |loc  =  d/d log sigma² |loc

Kingma et al. (2015) and the 2016 poster find multiplicative noise too noisy for ``alpha > 1``;
Molchanov et al. (2017) propose additive noise for its lower variance. Measured here, on weights
and with local reparameterization, and in closed form for linear regression.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.func import functional_call

from bayes_svdo import data
from bayes_svdo.analysis.figures import (
    BLUE,
    GREEN,
    ORANGE,
    PALETTE,
    TICK_SIZE,
    Array,
    Canvas,
    array,
    styled,
)
from bayes_svdo.distributions import UndrawnSample, kl
from bayes_svdo.inference import fit
from bayes_svdo.inference.surroundings import random_state
from bayes_svdo.models import BayesianNetwork, Categorical
from bayes_svdo.models.dense import dense

Loss = Callable[[Mapping[str, Tensor]], Tensor]

_SIZES = (64, 100, 50, 10)
_BATCH_SIZE, _LR = 100, 5e-3
# The noise is drawn in the weights (False) or in the outputs of linear operations (True).
_PLACES = {False: "drawn in weights", True: "drawn in outputs (local)"}
_COLOURS = {False: ORANGE, True: BLUE}
# Where one weight stands, as a share of its least-squares value; None: at the optimum for its alpha
PROGRESS: dict[str, float | None] = {
    "at half its value": 0.5,
    "at the fit": 1.0,
    "at the optimum": None,
}


class GradientVariance(NamedTuple):
    """Variance over the noise of the gradient of each weight, (P,), in the units of the loss²."""

    multiplicative: Tensor  # by loc, with alpha held fixed
    additive: Tensor  # by loc, with sigma held fixed
    log_sigma2: Tensor  # by log sigma², which is also by log alpha, with loc held fixed


def gradient_variance(
    loss: Loss,
    loc: Mapping[str, Tensor],
    log_alpha: Mapping[str, Tensor],
    *,
    local: bool,
    num_draws: int,
) -> GradientVariance:
    """Measure the variance of the gradients of ``loss``, with torch's global generator.

    Both gradients by ``loc`` come from the same draws, so their ratio is better known than they.

    Args:
        loss: Function of weights by name; its expectation over them is what is descended.
        loc: Means by name, none of them 0.
        log_alpha: Of the same names and shapes.
        local: Draw outputs of linear operations rather than weights.
        num_draws: How often the noise is drawn, at least 2.

    Returns:
        Unbiased estimates, all weights of all names in one vector.

    Raises:
        ValueError: ``num_draws`` is too small, or some ``loc`` is 0.
    """
    if num_draws < 2:
        raise ValueError(f"num_draws must be at least 2, got {num_draws}.")
    zeros = [name for name, value in loc.items() if bool((value == 0).any())]
    if zeros:
        raise ValueError(f'loc of "{zeros[0]}" has zeros, where multiplicative noise is undefined.')
    means = {name: value.detach().clone().requires_grad_() for name, value in loc.items()}
    log_sigma2 = {
        name: (log_alpha[name] + 2 * value.abs().log()).detach().requires_grad_()
        for name, value in loc.items()
    }
    parameters = [*means.values(), *log_sigma2.values()]
    scale = 2 / _flat(means.values()).detach()
    moments = _Moments()
    for _ in range(num_draws):
        samples = {name: UndrawnSample(means[name], log_sigma2[name]) for name in means}
        weights = samples if local else {name: draw.draw() for name, draw in samples.items()}
        gradients = torch.autograd.grad(loss(weights), parameters)
        by_loc, by_log_sigma2 = _flat(gradients[: len(means)]), _flat(gradients[len(means) :])
        moments.add(torch.stack((by_loc + scale * by_log_sigma2, by_loc, by_log_sigma2)))
    return GradientVariance(*moments.variance())


def linear_gradient_variance(
    x: Tensor,  # (M, D)
    y: Tensor,  # (M,)
    loc: Tensor,  # (D,)
    log_alpha: Tensor,  # (D,)
    *,
    local: bool,
) -> GradientVariance:
    """The same in closed form, for the loss ``|y - x w|²/2`` of a linear regression.

    Gaussian moments: ``(a + b e)(c + d e)`` with a standard normal ``e`` has the variance
    ``(a d + b c)² + 2 b² d²``.
    """
    sigma = (0.5 * log_alpha).exp() * loc.abs()
    root = sigma / loc  # sqrt(alpha), with the sign of loc
    residual = x @ loc - y
    if local:
        spread = (x.square() @ sigma.square()).sqrt()[:, None]  # (M, 1)
        lean = x.square() * sigma * root / spread  # (M, D), noise of d output/d loc
        pull = x.square() * sigma.square() / (2 * spread)  # (M, D), d output/d log sigma²
        error = residual[:, None]
        return GradientVariance(
            multiplicative=(
                (error * lean + spread * x).square() + 2 * (spread * lean).square()
            ).sum(0),
            additive=(spread * x).square().sum(0),
            log_sigma2=((error * pull).square() + 2 * (spread * pull).square()).sum(0),
        )
    shared = x.T @ x * sigma  # (D, D), noise of each weight in each weight's gradient
    own, mean = shared.diagonal(), x.T @ residual
    others = shared.square().sum(-1) - own.square()
    return GradientVariance(
        multiplicative=(mean * root + own).square()
        + 2 * (own * root).square()
        + others * (1 + root.square()),
        additive=others + own.square(),
        log_sigma2=0.25 * sigma.square() * (mean.square() + others + 2 * own.square()),
    )


@dataclass(frozen=True)
class NoiseComparison:
    """What was measured on a network that classifies scikit-learn's digits.

    The loss is the negative log-likelihood of all training data, estimated from minibatches of
    100; variances are in nats² over the squared unit of a weight.

    Attributes:
        log_alpha: Values that all weights of a trained network were given at once, (A,).
        shared: For noise drawn in weights (False) and in outputs (True), the means over all
            weights of the variances: rows multiplicative, additive, log sigma², (3, A).
        minibatch: Mean variance of the gradient over minibatches, without any noise.
        own_log_alpha: Centres of bins of the ``log_alpha`` that weights have in a network fitted by
            sparse variational dropout, (B,).
        num_weights: Number of weights in each bin that receive a gradient at all, (B,).
        ratio: For both places of the noise, quartiles over the weights of a bin of the ratio
            multiplicative / additive, (3, B); NaN in an empty bin.
    """

    log_alpha: Array
    shared: dict[bool, Array]
    minibatch: float
    own_log_alpha: Array
    num_weights: Array
    ratio: dict[bool, Array]

    def rows(self) -> list[dict[str, float | str]]:
        """One row per setting, place of the noise and ``log_alpha``."""
        rows: list[dict[str, float | str]] = []
        for local, place in _PLACES.items():
            for x, (multiplicative, additive, log_sigma2) in zip(
                self.log_alpha, self.shared[local].T, strict=True
            ):
                rows.append(
                    {
                        "setting": "all weights alike",
                        "noise": place,
                        "log_alpha": float(x),
                        "ratio": float(multiplicative / additive),
                        "multiplicative": float(multiplicative),
                        "additive": float(additive),
                        "log_sigma2": float(log_sigma2),
                        "minibatch": self.minibatch,
                    }
                )
            for x, number, (low, median, high) in zip(
                self.own_log_alpha, self.num_weights, self.ratio[local].T, strict=True
            ):
                rows.append(
                    {
                        "setting": "fitted",
                        "noise": place,
                        "log_alpha": float(x),
                        "ratio": float(median),
                        "ratio_25": float(low),
                        "ratio_75": float(high),
                        "num_weights": float(number),
                    }
                )
        for name, progress in PROGRESS.items():
            for x, ratio in zip(
                self.log_alpha, one_weight_ratio(self.log_alpha, progress), strict=True
            ):
                setting = f"one weight, {name}"
                rows.append({"setting": setting, "log_alpha": float(x), "ratio": float(ratio)})
        return rows


def one_weight_ratio(log_alpha: Array, progress: float | None) -> Array:  # (*shape) -> (*shape)
    """Variance of the gradient by ``loc``, multiplicative / additive: regression on one feature.

    With ``p = loc / least-squares value`` it is ``(2 - 1/p)² + 2 alpha`` in closed form: less than
    1, so that multiplicative noise is the better one, for ``1/3 < p < 1`` and small ``alpha``.

    Args:
        log_alpha: Any shape.
        progress: ``p``, not 0; None: ``1/(1 + alpha)``, the optimum of ``loc`` for this ``alpha``,
            where the ratio is ``1 + alpha²``.
    """
    alpha = np.exp(log_alpha)
    inverse = 1 + alpha if progress is None else 1 / progress
    return np.asarray((2 - inverse) ** 2 + 2 * alpha)


def compare_noise(
    *,
    log_alpha: Iterable[float] = tuple(range(-8, 9)),
    own_bins: Iterable[float] = tuple(range(-6, 13)),
    epochs: tuple[int, int] = (20, 60),
    minibatches: int = 4,
    num_draws: int = 25,
    seed: int = 0,
) -> NoiseComparison:
    """Measure the variance of gradients in a 64-100-50-10 network on scikit-learn's digits.

    Twice: in a network trained without KL, all weights of which are then given the same ``alpha``,
    and in one fitted with KL, whose weights have each their own.

    Args:
        log_alpha: Values that all weights are given at once.
        own_bins: Edges of the bins of the weights' own ``log_alpha``.
        epochs: Passes over the data of the first and the second network.
        minibatches: Minibatches whose variances are averaged.
        num_draws: Draws of the noise per minibatch; the second network gets four times as many,
            since there every weight counts by itself.
        seed: Of everything.
    """
    grid, edges = np.array([*log_alpha], dtype=float), np.array([*own_bins], dtype=float)
    x, y = data.load("digits").train
    x = x.flatten(1).double()
    trained = _train(x, y, epochs[0], with_kl=False, seed=seed)
    fitted = _train(x, y, epochs[1], with_kl=True, seed=seed)
    with random_state(seed, torch.device("cpu")):
        batches = [torch.randperm(len(x))[:_BATCH_SIZE] for _ in range(minibatches)]

        def average(network: _Network, log_alpha: Mapping[str, Tensor], **options: int) -> Tensor:
            """The variances of both places of the noise, (2, 3, P)."""
            places = [
                [
                    torch.stack(
                        gradient_variance(
                            network.loss(x[batch], y[batch], len(x)),
                            network.loc,
                            log_alpha,
                            local=local,
                            **options,
                        )
                    )
                    for batch in batches
                ]
                for local in _PLACES
            ]
            return torch.stack([torch.stack(found).mean(0) for found in places])

        alike = [
            average(
                trained,
                {name: torch.full_like(value, float(la)) for name, value in trained.loc.items()},
                num_draws=num_draws,
            ).mean(-1)
            for la in grid
        ]
        minibatch = _minibatch_variance(trained, x, y, 10 * minibatches)
        own = average(fitted, fitted.log_alpha, num_draws=4 * num_draws)
    flat = _flat(fitted.log_alpha.values())
    moved = (own[:, :2] > 0).all(0).all(0)
    ratio = own[:, 0] / own[:, 1]
    bins = [moved & (flat >= low) & (flat < high) for low, high in pairwise(edges)]
    return NoiseComparison(
        log_alpha=grid,
        shared={local: array(torch.stack(alike, -1)[i]) for i, local in enumerate(_PLACES)},
        minibatch=minibatch,
        own_log_alpha=0.5 * (edges[1:] + edges[:-1]),
        num_weights=np.array([float(chosen.sum()) for chosen in bins]),
        ratio={
            local: np.stack([_quartiles(ratio[i, chosen]) for chosen in bins], -1)
            for i, local in enumerate(_PLACES)
        },
    )


def plot_noise(result: NoiseComparison | None = None, *, figure: Canvas | None = None) -> Canvas:
    """Draw the variances and their ratios against log alpha, measured and in closed form.

    Args:
        result: What to draw; measured with the defaults if None, which takes half a minute.
        figure: Where to draw; a new figure if None.

    Returns:
        The figure, with four panels.
    """
    result = compare_noise() if result is None else result
    with styled(figure, (8.0, 6.4)) as figure:
        axes = cast("list[Axes]", figure.subplots(2, 2).ravel().tolist())
        _draw_variances(axes[0], result)
        _draw_shared_ratio(axes[1], result)
        _draw_own_ratio(axes[2], result)
        _draw_one_weight(axes[3], result)
        for ax in axes:
            ax.set_yscale("log")
            ax.tick_params(labelsize=TICK_SIZE)
        for ax in axes[1:]:
            ax.axhline(1, color="black", lw=0.8)
            ax.set_ylabel("variance, multiplicative / additive")
        figure.suptitle(
            "Additive noise pays for α > 1, and most where noise is drawn in the weights",
            x=0.01,
            ha="left",
        )
    return figure


class _Network(NamedTuple):
    """A trained network: its weights' posterior, and the rest as it is."""

    net: nn.Module
    loc: dict[str, Tensor]
    log_alpha: dict[str, Tensor]
    rest: dict[str, Tensor]

    def loss(self, x: Tensor, y: Tensor, num_data: int) -> Loss:
        """Negative log-likelihood of ``num_data`` points, estimated from a minibatch."""

        def loss(weights: Mapping[str, Tensor]) -> Tensor:
            logits = functional_call(self.net, {**self.rest, **weights}, x)
            return num_data * F.cross_entropy(logits, y)

        return loss


def _train(x: Tensor, y: Tensor, epochs: int, *, with_kl: bool, seed: int) -> _Network:
    with random_state(seed, torch.device("cpu")):
        network = BayesianNetwork(dense(_SIZES), Categorical(), num_data=len(x))
    posterior = fit(
        network,
        (x.float(), y),
        epochs=epochs,
        batch_size=_BATCH_SIZE,
        lr=_LR,
        kl_warmup=(0.05, 0.5) if with_kl else lambda _: 0.0,
        device="cpu",
        seed=seed,
        progress=False,
    )
    net = cast(BayesianNetwork, posterior.model).net.double()
    loc, log_alpha = {}, {}
    for name in posterior.guide.sites:
        mean, log_sigma2 = (
            value.detach().double() for value in posterior.guide.parameters_of(name)
        )
        loc[name] = mean.where(mean != 0, torch.finfo(torch.float32).tiny)
        log_alpha[name] = kl.log_alpha(loc[name], log_sigma2)
    rest = {name: value.detach() for name, value in net.named_parameters() if name not in loc}
    return _Network(net, loc, log_alpha, rest)


def _minibatch_variance(network: _Network, x: Tensor, y: Tensor, num_batches: int) -> float:
    """Mean over the weights of the variance of the gradient without noise, over minibatches."""
    loc = {name: value.clone().requires_grad_() for name, value in network.loc.items()}
    moments = _Moments()
    for _ in range(num_batches):
        batch = torch.randperm(len(x))[:_BATCH_SIZE]
        loss = network.loss(x[batch], y[batch], len(x))(loc)
        moments.add(_flat(torch.autograd.grad(loss, list(loc.values()))))
    return float(moments.variance().mean())


def _quartiles(values: Tensor) -> Array:  # (n,) -> (3,)
    if not len(values):
        return np.full(3, np.nan)
    return array(values.quantile(values.new_tensor([0.25, 0.5, 0.75])))


class _Moments:
    """Running mean and sum of squared deviations (Welford, 1962)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, value: Tensor) -> None:
        self.count += 1
        offset = value.detach() - self.mean
        self.mean = self.mean + offset / self.count
        self.squares = self.squares + offset * (value.detach() - self.mean)

    def variance(self) -> Tensor:
        return self.squares / (self.count - 1)


def _flat(values: Iterable[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def _draw_variances(ax: Axes, result: NoiseComparison) -> None:
    for local, place in _PLACES.items():
        for row, (name, style) in enumerate((("multiplicative", "--"), ("additive", "-"))):
            ax.plot(
                result.log_alpha,
                result.shared[local][row],
                style,
                color=_COLOURS[local],
                label=f"{name}, {place}",
            )
    ax.axhline(result.minibatch, color="black", lw=1, ls=":", label="minibatches alone, no noise")
    ax.set(xlabel="log α of all weights", ylabel="variance of d NLL / dθ (nats²)")
    ax.set_title("Variance, all weights alike")
    ax.legend()


def _draw_shared_ratio(ax: Axes, result: NoiseComparison) -> None:
    for local, place in _PLACES.items():
        multiplicative, additive, _ = result.shared[local]
        ax.plot(result.log_alpha, multiplicative / additive, color=_COLOURS[local], label=place)
    _draw_reference(ax, result.log_alpha)
    ax.set(xlabel="log α of all weights", title="Ratio, all weights alike")
    ax.legend()


def _draw_own_ratio(ax: Axes, result: NoiseComparison) -> None:
    for local, place in _PLACES.items():
        low, median, high = result.ratio[local]
        x = result.own_log_alpha
        ax.fill_between(x, low, high, color=_COLOURS[local], alpha=0.2, lw=0)
        ax.plot(x, median, color=_COLOURS[local], label=f"{place}: median, quartiles")
    _draw_reference(ax, result.own_log_alpha)
    ax.set(xlabel="a weight's own log α", title="Ratio, network fitted with KL")
    ax.legend()


def _draw_reference(ax: Axes, log_alpha: Array) -> None:
    x = np.linspace(log_alpha.min(), log_alpha.max(), 200)
    ax.plot(x, 1 + np.exp(x), color="black", lw=1, ls=":", label="1 + α")


def _draw_one_weight(ax: Axes, result: NoiseComparison) -> None:
    x = np.linspace(result.log_alpha.min(), result.log_alpha.max(), 200)
    for (name, progress), colour in zip(PROGRESS.items(), (GREEN, *PALETTE[3:5]), strict=True):
        ax.plot(x, one_weight_ratio(x, progress), color=colour, label=f"θ {name}")
    ax.set_ylim(1e-2, None)
    ax.axhspan(1e-2, 1, color="0.95", zorder=0)
    ax.annotate(
        "here multiplicative noise is the quieter",
        (0.98, 0.04),
        xycoords="axes fraction",
        ha="right",
        fontsize=TICK_SIZE,
    )
    ax.set(xlabel="log α", title="Ratio, regression on one feature (exact)")
    ax.legend()
