"""Means and variances of a network's output in one pass, without drawing anything.

Means and variances of independent Gaussian weights go through the network layer by layer (assumed
density filtering: Hernández-Lobato & Adams (2015), https://arxiv.org/abs/1502.05336;
Gast & Roth (2018), https://arxiv.org/abs/1805.11327). Two assumptions are made on the way: what
enters a ReLU is Gaussian, and the units of a layer are independent. Both hold exactly up to the
first hidden layer, so mean and variance of the output are exact for a linear network and for one
with a single hidden layer; deeper ones are approximated. Outputs share their hidden units:
:func:`draws_by_moments` has their covariance, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_svdo.distributions.draw import _MAX_LOG_VARIANCE
from bayes_svdo.inference.inputs import as_tensor
from bayes_svdo.inference.posterior import Posterior, dtype_hint
from bayes_svdo.models.bayesian_network import check_rows

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
    variances do not tell: :func:`draws_by_moments`.

    Args:
        posterior: Of a :class:`~bayes_svdo.models.BayesianNetwork` whose net is made of ``Linear``,
            ``ReLU``, ``Flatten``, ``Identity`` and ``Dropout`` modules, in a row or in nested
            ``Sequential`` ones, each weight used once: also positions of a sequence, each for
            itself, but no ``Flatten`` of them. Pruned are the weights that were pruned while
            training.
        x: Inputs of shape ``(N, ...)``, a tensor or an array of the posterior's dtype.

    Returns:
        Shape ``(N, ...)``, that of the network's output.

    Raises:
        TypeError: The net has another module, or a site that is no layer's weight; it is named.
        ValueError: A weight is used twice, so that layers are dependent; positions are flattened;
            or ``x`` does not fit.
    """
    data = _data(posterior, x)
    moments = _passed_through(_layers_of(posterior), data)
    check_rows(moments.mean, data.mean)
    return moments


@torch.no_grad()
def draws_by_moments(posterior: Posterior, x: Tensor, num_samples: int) -> Iterator[Tensor]:
    """Gaussian draws of the network's output, with its means and its covariance over units.

    What enters the last linear layer is drawn from its moments, and what leaves it given that: its
    outputs share what they are made of. For a network with one hidden layer means and
    covariances are exact.

    Args:
        posterior: As for :func:`output_moments`.
        x: As for :func:`output_moments`.
        num_samples: Number of draws.

    Yields:
        Shape ``(N, ...)``, float64.

    Raises:
        TypeError: As for :func:`output_moments`.
        ValueError: As for :func:`output_moments`.
    """
    layers = _layers_of(posterior)
    last = max(index for index, layer in enumerate(layers) if isinstance(layer, _Linear))
    data = _data(posterior, x)
    entering = _passed_through(layers[:last], data)
    for _ in range(num_samples):
        hidden = _drawn(entering)
        output = _drawn(_passed_through([layers[last]], _certain(hidden)))
        output = _passed_through(layers[last + 1 :], _certain(output)).mean
        yield check_rows(output, data.mean)


class _Linear(NamedTuple):
    """A layer with the moments of its weights."""

    path: str
    weight: Moments
    bias: Moments


def _passed_through(layers: Sequence[_Linear | nn.Module], moments: Moments) -> Moments:
    for layer in layers:
        if isinstance(layer, _Linear):
            needed, found = layer.weight.mean.shape[-1], moments.mean.shape[-1]
            if needed != found:
                raise ValueError(
                    f'the network cannot take x: its layer "{layer.path}" needs {needed} inputs, '
                    f"but gets {found}."
                )
            moments = linear(moments, layer.weight, layer.bias)
        elif isinstance(layer, nn.ReLU):
            moments = rectified_gaussian(*moments)
        elif isinstance(layer, nn.Flatten):
            moments = _flattened(layer, moments)
    return moments


def _flattened(layer: nn.Flatten, moments: Moments) -> Moments:
    mean: Tensor = layer(moments.mean)
    positions = math.prod(moments.mean.shape[1:-1])
    if positions > 1 and mean.shape != moments.mean.shape and moments.variance.any():
        raise ValueError(
            "moment propagation takes units for independent, but a Flatten puts side by side what "
            f"the same weights make of {positions} positions."
            '\n  Try method="weights".'
        )
    return Moments(mean, layer(moments.variance))


def _certain(value: Tensor) -> Moments:
    return Moments(value, torch.zeros_like(value))


def _drawn(moments: Moments) -> Tensor:
    return torch.addcmul(moments.mean, moments.variance.sqrt(), torch.randn_like(moments.mean))


def _data(posterior: Posterior, x: Any) -> Moments:
    inputs = as_tensor(x, "x").to(posterior.device)
    hint = dtype_hint(inputs, posterior.dtype)
    if hint:
        raise ValueError(f"the network cannot take x of dtype {inputs.dtype}.{hint}")
    return _certain(inputs.double())


def _layers_of(posterior: Posterior) -> list[_Linear | nn.Module]:
    """The layers of the posterior's network, linear ones with their moments."""
    network = posterior._network("moment propagation")
    layers = _checked_layers(network.net)
    sites = {id(network.net.get_buffer(name)): name for name in network.sites}
    linears = [layer for _, layer in layers if isinstance(layer, nn.Linear)]
    for value in sites.keys() - {id(v) for layer in linears for v in (layer.weight, layer.bias)}:
        raise TypeError(
            f'moment propagation takes weights and biases of Linear layers, but "{sites[value]}" '
            'is something else.\n  Try method="local".'
        )
    found: list[_Linear | nn.Module] = []
    for path, layer in layers:
        if isinstance(layer, nn.Linear):
            bias: Tensor | None = layer.bias
            bias = layer.weight.new_zeros(layer.out_features) if bias is None else bias
            moments = (_moments_of(posterior, sites, value) for value in (layer.weight, bias))
            found.append(_Linear(path, *moments))
        else:
            found.append(layer)
    return found


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
