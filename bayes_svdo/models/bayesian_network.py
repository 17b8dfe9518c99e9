"""Any ``torch.nn.Module`` as a Pyro model: its weights are given a prior, its biases are not.

The generative story::

    w_i ~ prior                      for every chosen parameter i
    y_n ~ likelihood(net(x_n; w))    for n = 1..num_data
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bayes_svdo._names import closest
from bayes_svdo.distributions import LogUniform, UndrawnSample
from bayes_svdo.models.likelihoods import Likelihood

Where = str | type[nn.Module] | Callable[[str, Tensor], bool]

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


class BayesianNetwork(PyroModule):
    """A network whose weights carry a prior: a Pyro model ``model(x, y=None)``.

    The net is copied, never changed. In the copy each chosen parameter becomes a sample site named
    by its parameter path (``"fc1.weight"``), and the net's own value of it a buffer, from which
    :class:`~bayes_svdo.inference.AdditiveNoiseGuide` starts; the rest stay parameters (point
    estimates).

    Args:
        net: Any module; called as ``net(x)``, or ``net(*x)`` if ``x`` is a tuple.
        likelihood: ``Categorical()``, ``Bernoulli()``, ``Gaussian()`` or your own.
        num_data: Number of data points in the training set: a batch of M is scaled by num_data / M.
        prior: A distribution over one weight, expanded to the shape of each parameter.
        where: Which parameters get the prior: a name pattern (``"fc*.weight"``), a module type
            (all parameters of two or more dimensions of such modules), a predicate of name and
            parameter, or a list of these (any of them). Default: every parameter of two or more
            dimensions that does not belong to a normalisation layer.

    Raises:
        TypeError: ``net``, ``likelihood``, ``prior`` or ``where`` is not of its type.
        ValueError: ``num_data`` is not a positive integer, or ``where`` selects nothing.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        num_data: int,
        prior: TorchDistribution | None = None,
        where: Where | Sequence[Where] | None = None,
    ) -> None:
        super().__init__("model")
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, but is a {type(net).__name__}.")
        if not isinstance(likelihood, nn.Module):
            raise TypeError(
                "likelihood must be an instance of one of bayes_svdo.models.likelihoods, such as "
                f"Categorical(), but is {likelihood!r}."
            )
        if isinstance(num_data, bool) or not isinstance(num_data, int) or num_data < 1:
            raise ValueError(
                "num_data must be the number of data points in the training set, an integer of at "
                f"least 1, but is {num_data!r}."
            )
        prior = LogUniform() if prior is None else prior
        if not isinstance(prior, TorchDistribution) or prior.event_shape or prior.batch_shape:
            raise TypeError(
                "prior must be a Pyro distribution over one weight (empty batch and event shape), "
                f"such as LogUniform(), but is {prior!r}."
            )
        self.net = deepcopy(net)
        self.likelihood = likelihood
        self.num_data = num_data
        self.prior = prior
        self.sites: tuple[str, ...] = _select(self.net, where)
        _freeze(self.net, self.sites)

    def initial_weights(self) -> dict[str, Tensor]:
        """The net's own value of each site, by site name."""
        return {name: self.net.get_buffer(name) for name in self.sites}

    def layer_of(self, site: str) -> nn.Module:
        """The module that a site's weight belongs to."""
        return self.net.get_submodule(site.rpartition(".")[0])

    def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
        """The model.

        Args:
            x: Inputs of shape ``(M, ...)``, or a tuple of such.
            y: Targets of shape ``(M, ...)``; None to predict.

        Returns:
            The network's output for the sampled weights, shape ``(*samples, M, ...)``.
        """
        weights = {name: self._sample(name) for name in self.sites}
        output, sample_dims = self._run(weights, x)
        self.likelihood(output, y, self.num_data, sample_dims)
        return output

    def _sample(self, name: str) -> Tensor:
        shape = self.net.get_buffer(name).shape
        prior = self.prior.expand(shape).to_event(len(shape))
        value: Tensor = pyro.sample(name, prior)
        return value

    def _run(self, weights: dict[str, Tensor], x: Any) -> tuple[Tensor, int]:
        """The net at these weights, and the number of leading sample dimensions of its output."""
        inputs = x if isinstance(x, tuple) else (x,)
        net = self.net
        batch_shape = _sample_shape(weights, net)
        if not batch_shape:
            return functional_call(net, weights, inputs), 0
        # Vectorised particles: one network per sample. Singleton dimensions come from plates.
        flat = {
            name: (w.draw() if isinstance(w, UndrawnSample) else w)
            .expand(*batch_shape, *net.get_buffer(name).shape)
            .flatten(0, len(batch_shape) - 1)
            for name, w in weights.items()
        }
        run = vmap(lambda w: functional_call(net, w, inputs), randomness="different")
        output = run(flat)
        # The data plate is at -1: sample plates further left keep their place, without their ones.
        samples = tuple(size for size in batch_shape if size > 1) or (1,)
        return output.unflatten(0, samples), len(samples)


def _sample_shape(weights: dict[str, Tensor], net: nn.Module) -> torch.Size:
    shapes = [w.shape[: w.dim() - net.get_buffer(name).dim()] for name, w in weights.items()]
    return torch.Size(torch.broadcast_shapes(*shapes))


def _select(net: nn.Module, where: Where | Sequence[Where] | None) -> tuple[str, ...]:
    """Names of the parameters that ``where`` chooses, in the net's own order."""
    owners = {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in net.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    parameters = dict(net.named_parameters())
    if where is None:
        chosen = tuple(
            name
            for name, parameter in parameters.items()
            if parameter.dim() >= 2 and not isinstance(owners[name], _NORMALISATION)
        )
    else:
        rules = (
            [where]
            if isinstance(where, (str, type)) or not isinstance(where, Sequence)
            else list(where)
        )
        predicates = [_predicate(rule, owners) for rule in rules]
        chosen = tuple(
            name
            for name, parameter in parameters.items()
            if any(predicate(name, parameter) for predicate in predicates)
        )
    if not chosen:
        patterns = [rule for rule in [where] if isinstance(rule, str)]
        hint = closest(patterns[0], parameters) if patterns else ""
        raise ValueError(
            f"where={where!r} selects none of the net's parameters.{hint}\n"
            f"  The net has: {', '.join(parameters) or 'no parameters'}."
        )
    not_floating = [name for name in chosen if not parameters[name].is_floating_point()]
    if not_floating:
        raise TypeError(
            f'"{not_floating[0]}" has dtype {parameters[not_floating[0]].dtype}; only '
            "floating-point parameters can carry a prior."
        )
    return chosen


def _predicate(rule: Where, owners: dict[str, nn.Module]) -> Callable[[str, Tensor], bool]:
    if isinstance(rule, str):
        return lambda name, parameter: fnmatch.fnmatchcase(name, rule)
    if isinstance(rule, type) and issubclass(rule, nn.Module):
        return lambda name, parameter: isinstance(owners[name], rule) and parameter.dim() >= 2
    if callable(rule) and not isinstance(rule, type):
        return rule
    raise TypeError(
        "where must be a name pattern, a module type, a predicate of name and parameter, or a list "
        f"of these, but holds {rule!r}."
    )


def _freeze(net: nn.Module, names: Sequence[str]) -> None:
    """Turn the named parameters, and every alias of them (tied weights), into buffers."""
    parameters = dict(net.named_parameters())
    chosen = {id(parameters[name]) for name in names}
    buffers = {id(p): p.detach().clone() for p in parameters.values() if id(p) in chosen}
    for module in net.modules():
        for key, parameter in list(module._parameters.items()):
            if id(parameter) in chosen:
                del module._parameters[key]
                module.register_buffer(key, buffers[id(parameter)])
