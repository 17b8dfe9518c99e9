"""Means and variances of a network's output in one pass, without drawing anything.

Means and variances of independent Gaussian weights go through the network layer by layer (assumed
density filtering: Hernández-Lobato & Adams (2015), https://arxiv.org/abs/1502.05336;
Gast & Roth (2018), https://arxiv.org/abs/1805.11327). Two assumptions are made on the way: what
enters a ReLU is Gaussian, and the units of a layer are independent. Both hold exactly up to the
first hidden layer, so mean and variance of the output are exact for a linear network and for one
with a single hidden layer; deeper ones are approximated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_svdo.distributions.draw import _MAX_LOG_VARIANCE
from bayes_svdo.inference.posterior import Posterior

# What a module does is its forward, which a subclass may have changed.
_KNOWN = (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout)
# Beyond so many standard deviations the density of a Gaussian is zero in float64.
_FAR = 40.0


class Moments(NamedTuple):
    """Means and variances of independent numbers, two tensors of one shape."""

    mean: Tensor
    variance: Tensor


def rectified_gaussian(mean: Tensor, variance: Tensor) -> Moments:
    """Mean and variance of ``max(z, 0)`` for ``z ~ N(mean, variance)``, elementwise.

    With ``a = mean / sigma``, ``E = sigma (a Φ(a) + φ(a))`` and ``E² + Var = sigma² ((a² + 1) Φ(a)
    + a φ(a))`` (Frey & Hinton (1999), "Variational learning in nonlinear Gaussian belief
    networks"). They are computed from Mills' ratio, and for ``a > 0`` from the part that is cut
    off, so that the variance is no difference of large numbers.

    Args:
        mean: Any shape, floating point.
        variance: Of the same shape, not negative; where it is zero, so is the result's.
    """
    sigma = variance.sqrt()
    a = torch.where(variance > 0, mean / sigma, 0.0)
    t = a.abs().clamp(max=_FAR)
    density = torch.exp(-0.5 * t.square()) / math.sqrt(2 * math.pi)
    mills = math.sqrt(math.pi / 2) * torch.special.erfcx(t / math.sqrt(2))
    # First and second moment of max(-t + e, 0) with e ~ N(0, 1).
    first = density * (1 - t * mills)
    second = density * ((t.square() + 1) * mills - t)
    below = Moments(first, second - first.square())
    above = Moments(a + first, 1 - second - 2 * t * first - first.square())
    rectified_mean = torch.where(a > 0, above.mean, below.mean)
    rectified_variance = torch.where(a > 0, above.variance, below.variance)
    return Moments(
        torch.where(variance > 0, sigma * rectified_mean, mean.clamp(min=0)),
        variance * rectified_variance.clamp(min=0),
    )


def linear(x: Moments, weight: Moments, bias: Moments) -> Moments:
    """Moments of ``weight @ x + bias``, all independent: exact.

    Args:
        x: Inputs, shape ``(..., in)``.
        weight: Shape ``(out, in)``.
        bias: Shape ``(out,)``.

    Returns:
        Shape ``(..., out)``.
    """
    variance = F.linear(x.mean.square(), weight.variance, bias.variance)
    if x.variance.any():  # data have none, and no matrix product is spent on it
        variance = variance + F.linear(x.variance, weight.mean.square() + weight.variance)
    return Moments(F.linear(x.mean, weight.mean, bias.mean), variance)


@torch.no_grad()
def output_moments(posterior: Posterior, x: Tensor) -> Moments:
    """Means and variances of the network's output over the posterior, by propagation.

    In float64 and in evaluation mode. The output's units are dependent on one another, which their
    variances do not tell.

    Args:
        posterior: Of a :class:`~bayes_svdo.models.BayesianNetwork` whose net is made of ``Linear``,
            ``ReLU``, ``Flatten``, ``Identity`` and ``Dropout`` modules, in a row or in nested
            ``Sequential`` ones, each weight used once. Pruned are the weights that were pruned
            while training.
        x: Inputs of shape ``(N, ...)``, on the posterior's device.

    Returns:
        Shape ``(N, ...)``, that of the network's output.

    Raises:
        TypeError: The net has another module, or a site that is no layer's weight; it is named.
        ValueError: A weight is used twice, so that layers are dependent; or ``x`` does not fit.
    """
    network = posterior._network("moment propagation")
    layers = _checked_layers(network.net)
    sites = {id(network.net.get_buffer(name)): name for name in network.sites}
    linears = [layer for _, layer in layers if isinstance(layer, nn.Linear)]
    for value in sites.keys() - {id(v) for layer in linears for v in (layer.weight, layer.bias)}:
        raise TypeError(
            f'moment propagation takes weights and biases of Linear layers, but "{sites[value]}" '
            'is something else.\n  Try method="local".'
        )
    moments = Moments(x.double(), torch.zeros_like(x, dtype=torch.float64))
    for path, layer in layers:
        if isinstance(layer, nn.Linear):
            if moments.mean.shape[-1] != layer.in_features:
                raise ValueError(
                    f'the network cannot take x of shape {tuple(x.shape)}: its layer "{path}" '
                    f"needs {layer.in_features} inputs, but gets {moments.mean.shape[-1]}."
                )
            weight = _moments_of(posterior, sites, layer.weight)
            bias: Tensor | None = layer.bias
            bias = layer.weight.new_zeros(layer.out_features) if bias is None else bias
            moments = linear(moments, weight, _moments_of(posterior, sites, bias))
        elif isinstance(layer, nn.ReLU):
            moments = rectified_gaussian(*moments)
        elif isinstance(layer, nn.Flatten):
            moments = Moments(*map(layer, moments))
    return moments


def _checked_layers(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of ``net`` in their order, by path.

    Raises:
        TypeError: There is one that moments cannot go through.
        ValueError: A weight is used more than once.
    """
    layers = list(_layers(net, ""))
    owners: dict[int, str] = {}
    for path, layer in layers:
        for weight in (layer.weight, layer.bias) if isinstance(layer, nn.Linear) else ():
            owner = owners.setdefault(id(weight), path)
            if weight is not None and owner != path:
                raise ValueError(
                    f'moment propagation takes each weight once, but "{path}" has that of '
                    f'"{owner}", so that their noise is the same.\n  Try method="local".'
                )
    return layers


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential) and _is(module, nn.Sequential):
        for name, child in module._modules.items():  # named_children leaves out repetitions
            assert child is not None
            yield from _layers(child, f"{path}.{name}" if path else name)
    elif any(_is(module, known) for known in _KNOWN):
        yield path or type(module).__name__, module
    else:
        where = f'"{path}"' if path else "the net"
        known = ", ".join(each.__name__ for each in _KNOWN)
        raise TypeError(
            f"moment propagation takes Sequential networks of {known}, but {where} is a "
            f'{type(module).__name__}.\n  Try method="local".'
        )


def _is(module: nn.Module, known: type[nn.Module]) -> bool:
    return isinstance(module, known) and type(module).forward is known.forward


def _moments_of(posterior: Posterior, sites: Mapping[int, str], value: Tensor) -> Moments:
    """A site's moments, or those of a point estimate."""
    if id(value) not in sites:
        return Moments(value.double(), torch.zeros_like(value, dtype=torch.float64))
    loc, log_sigma2 = posterior.guide.parameters_of(sites[id(value)])
    return Moments(loc.double(), log_sigma2.double().clamp(max=_MAX_LOG_VARIANCE).exp())
