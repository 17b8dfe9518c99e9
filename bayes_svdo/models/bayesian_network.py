"""Any ``torch.nn.Module`` as a Pyro model: its weights are given a prior, its biases are not.

The generative story::

    w_i ~ prior                      for every chosen parameter i
    y_n ~ likelihood(net(x_n; w))    for n = 1..num_data
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy, deepcopy
from numbers import Integral
from typing import Any, NoReturn, Self

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from pyro.nn import PyroModule
from pyro.poutine.runtime import effectful
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from bayes_svdo._names import closest
from bayes_svdo._signatures import check_takes
from bayes_svdo.distributions import LogUniform
from bayes_svdo.distributions.scale_free import ScaleFreePrior
from bayes_svdo.distributions.undrawn import again, constants, drawn
from bayes_svdo.models.likelihoods import Likelihood

Where = str | type[nn.Module] | Callable[[str, Tensor], bool]

_NORMALISATION = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


class OutputError(TypeError):
    """A network's output is not one tensor."""


class BayesianNetwork(PyroModule):
    """A network whose weights carry a prior: a Pyro model ``model(x, y=None)``.

    The net is copied, never changed. In the copy each chosen parameter becomes a sample site named
    by its parameter path (``"fc1.weight"``), and the net's own value of it a buffer, from which
    :class:`~bayes_svdo.inference.AdditiveNoiseGuide` starts; the rest stay parameters (point
    estimates).

    Args:
        net: Any module; called as ``net(x)``, or ``net(*x)`` if ``x`` is a tuple.
        likelihood: ``Categorical()``, ``Bernoulli()``, ``Gaussian()`` or a ``Likelihood`` of yours.
        num_data: Number of data points in the training set: a batch of M is scaled by num_data / M.
        prior: A distribution over one weight, expanded to the shape of each parameter. It moves to
            the network's device and dtype.
        where: Which parameters get the prior: a name pattern (``"fc*.weight"``), a module type
            (all parameters of two or more dimensions of such modules), a predicate of name and
            parameter, or a list of these (any of them). A tied weight is chosen by any of its
            names. Default: every trainable parameter of two or more dimensions that is not called
            ``bias`` and does not belong to a normalisation layer.

    Raises:
        TypeError: ``net``, ``likelihood``, ``prior`` or ``where`` is not of its type, or ``net``
            cannot be copied.
        ValueError: ``num_data`` is not a positive integer, or ``where``, or an entry of it, selects
            nothing.
    """

    def __init__(
        self,
        net: nn.Module,
        likelihood: Likelihood,
        num_data: int,
        prior: TorchDistributionMixin | None = None,
        where: Where | Sequence[Where] | None = None,
    ) -> None:
        super().__init__("model")
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, but is a {type(net).__name__}.")
        if not isinstance(likelihood, Likelihood):
            raise TypeError(
                "likelihood must be an instance of one of bayes_svdo.models.likelihoods, such as "
                f"Categorical(), but is {likelihood!r}."
            )
        given: object = num_data  # NumPy's integers are integers, too
        if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
            raise ValueError(
                "num_data must be the number of data points in the training set, an integer of at "
                f"least 1, but is {num_data!r}."
            )
        prior = LogUniform() if prior is None else prior
        if not isinstance(prior, TorchDistributionMixin) or prior.event_shape or prior.batch_shape:
            raise TypeError(
                "prior must be a Pyro distribution over one weight (empty batch and event shape), "
                f"such as LogUniform() or pyro.distributions.Normal(0.0, 1.0), but is {prior!r}."
            )
        self.sites: tuple[str, ...] = _select(net, where)
        self.net = _copied(net)
        _freeze(self.net, self.sites)
        self.likelihood = likelihood
        self.num_data = int(num_data)
        own = self.net.get_buffer(self.sites[0])
        self.prior = _moved(prior, lambda value: value.to(own))

    def own_weights(self) -> dict[str, Tensor]:
        """The net's own value of each site, by site name."""
        return {name: self.net.get_buffer(name) for name in self.sites}

    def initial_weights(self) -> dict[str, Tensor]:
        """Where a guide starts, by site name: the net's own weights, or what was given instead."""
        return {
            name: own if (start := self._buffers.get(_start(number))) is None else start
            for number, (name, own) in enumerate(self.own_weights().items())
        }

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Let a guide start from these weights, one for every site; they are copied.

        ``fit`` gives the means that it found, so that its model goes on where they are. They are
        no part of ``state_dict()``.
        """
        for number, name in enumerate(self.sites):
            self.register_buffer(_start(number), weights[name].detach().clone(), persistent=False)

    def output(self, weights: dict[str, Tensor], inputs: tuple[Any, ...]) -> Tensor:
        """The net's output for given weights, by site name, shape ``(M, ...)``.

        Raises:
            OutputError: It is not one tensor.
            ValueError: It is not one row for each of the ``M`` inputs.
        """
        return check_rows(_call(self.net, weights, inputs), inputs[0])

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
        net = self.net  # read once: Pyro looks through its parameters every time
        weights = {name: self._sample(name, net.get_buffer(name)) for name in self.sites}
        output, sample_dims = _run(net, weights, x)
        self.likelihood(output, y, self.num_data, sample_dims)
        return output

    def _sample(self, name: str, own: Tensor) -> Tensor:
        prior = self.prior.expand(own.shape).to_event(own.dim())
        # Pyro's Predictive finds the shapes of sites from a draw of the prior; for an improper
        # prior, which has none, the net's own weight serves.
        improper = isinstance(self.prior, ScaleFreePrior) and _initialised_by_sampling()
        with InitMessenger(lambda site: own) if improper else nullcontext():
            value: Tensor = pyro.sample(name, prior)
        return value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What .to(), .cuda() and .double() do to parameters.
        super()._apply(fn, recurse)
        self.prior = _moved(self.prior, fn)
        return self


def _run(net: nn.Module, weights: dict[str, Tensor], x: Any) -> tuple[Tensor, int]:
    """The net at these weights, and the number of leading sample dimensions of its output."""
    inputs = x if type(x) is tuple else (x,)  # a PackedSequence is a tuple, too, and one input
    shapes = {name: net.get_buffer(name).shape for name in weights}
    batches = [w.shape[: w.dim() - len(shapes[name])] for name, w in weights.items()]
    batch = torch.broadcast_shapes(*batches) if any(batches) else torch.Size()
    if not batch:
        places = _NOISY_OUTPUTS.get()
        if not places:
            return _call(net, weights, inputs), 0
        return _noisy(net, weights, inputs, places[0]).unflatten(0, places), len(places)
    # Vectorised particles: one network per sample, one after the other. (Under vmap recurrent
    # layers do not run, nor does batch normalisation in training.)
    flat = {
        name: drawn(w).expand(*batch, *shapes[name]).reshape(-1, *shapes[name])
        for name, w in weights.items()
    }
    outputs = [
        _call(net, {name: w[index] for name, w in flat.items()}, inputs)
        for index in range(batch.numel())
    ]
    # The last dimension is where the data plate comes; plates of samples lie to its left.
    places = batch[:-1] if len(batch) > 1 and batch[-1] == 1 else batch
    return torch.stack(outputs).unflatten(0, places), len(places)


# Leading dimensions of the output that undrawn weights are to have, if any.
_NOISY_OUTPUTS: ContextVar[tuple[int, ...]] = ContextVar("_NOISY_OUTPUTS", default=())


@contextmanager
def noisy_outputs(*places: int) -> Iterator[None]:
    """Within, networks with undrawn weights give ``places[0]`` outputs, each with its own noise.

    All but the first of ``places`` are 1. What does not depend on noise, such as the products of a
    first layer, is computed once.
    """
    token = _NOISY_OUTPUTS.set(places)
    try:
        yield
    finally:
        _NOISY_OUTPUTS.reset(token)


def _noisy(
    net: nn.Module, weights: dict[str, Tensor], inputs: tuple[Any, ...], count: int
) -> Tensor:  # (count, M, ...)
    def one(_: Tensor) -> Tensor:
        return _call(net, {name: again(w) for name, w in weights.items()}, inputs)

    if any(isinstance(m, nn.modules.batchnorm._NormBase) and m.training for m in net.modules()):
        raise NotImplementedError("running statistics cannot be updated under torch.vmap.")
    index = torch.arange(count, device=next(iter(weights.values())).device)
    outputs: Tensor = torch.vmap(one, randomness="different")(index)
    return outputs


def _call(net: nn.Module, weights: dict[str, Tensor], inputs: tuple[Any, ...]) -> Tensor:
    with constants([*net.parameters(), *net.buffers()]):
        output = functional_call(net, weights, inputs)
    if not isinstance(output, Tensor):
        raise OutputError(
            f"net must return one tensor, but returned a {type(output).__name__}.\n"
            "  Try a module around it that picks what the likelihood needs."
        )
    return output


def check_rows(output: Tensor, x: Tensor) -> Tensor:
    """``output``, if it has one row for each data point of ``x``.

    Raises:
        ValueError: It has not.
    """
    if output.dim() == 0 or len(output) != len(x):
        raise ValueError(
            f"the network's output must have one row for each of the {len(x)} data points of x, "
            f"but has shape {tuple(output.shape)}, for x of shape {tuple(x.shape)}.\n"
            "  Try x[None] if that is a single data point."
        )
    return output


@effectful(type="get_init_messengers")
def _init_messengers() -> list[Any]:
    """The ``InitMessenger`` handlers around this call, by Pyro's own protocol."""
    return []


def _initialised_by_sampling() -> bool:
    return any(messenger.init_fn is init_to_sample for messenger in _init_messengers())


def _start(number: int) -> str:
    """The buffer of the ``number``-th site's weight to start from."""
    return f"_start_{number}"


def _copied(net: nn.Module) -> nn.Module:
    try:
        return deepcopy(net)
    except RuntimeError as error:
        computed = [
            f"{prefix}.{key}" if prefix else key
            for prefix, module in net.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor) and not value.is_leaf
        ]
        if not computed:
            raise
        raise TypeError(
            f"net cannot be copied: {', '.join(computed)} is computed from other parameters by a "
            "hook.\n  Try torch.nn.utils.parametrizations.weight_norm (or spectral_norm) instead "
            "of torch.nn.utils.weight_norm, or torch.nn.utils.prune.remove."
        ) from error


def _moved(prior: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a distribution with its tensors moved."""
    moved = copy(prior)
    for key, value in vars(prior).items():
        if isinstance(value, Tensor):
            vars(moved)[key] = move(value)
        elif isinstance(value, Distribution):
            vars(moved)[key] = _moved(value, move)
    return moved


_Rule = Callable[[str, Tensor, nn.Module], bool]


def _select(net: nn.Module, where: Where | Sequence[Where] | None) -> tuple[str, ...]:
    """Names of the parameters that ``where`` chooses, in the net's own order."""
    parameters = dict(net.named_parameters())
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise ValueError(
                f'"{name}" has no shape yet, being of a lazy module.\n  Try net(x) once before.'
            )
    # A tied weight has several names and owners, and goes by its first.
    first = {id(parameter): name for name, parameter in parameters.items()}
    owned = [
        (f"{prefix}.{key}" if prefix else key, parameter, module)
        for prefix, module in net.named_modules(remove_duplicate=False)
        for key, parameter in module._parameters.items()
        if parameter is not None
    ]
    chosen = set()
    for rule in _rules(where):
        choose = _predicate(rule)
        names = {
            first[id(parameter)]
            for name, parameter, module in owned
            if choose(name, parameter, module)
        }
        if not names:
            hint = closest(rule, [name for name, _, _ in owned]) if isinstance(rule, str) else ""
            _refuse(rule, hint, parameters)
        chosen |= names
    if not chosen:
        _refuse(where, "", parameters)
    for name in chosen:
        if not parameters[name].is_floating_point():
            raise TypeError(
                f'"{name}" has dtype {parameters[name].dtype}; only floating-point parameters can '
                "carry a prior."
            )
    return tuple(name for name in parameters if name in chosen)


def _refuse(rule: object, hint: str, parameters: Mapping[str, Tensor]) -> NoReturn:
    raise ValueError(
        f"where={rule!r} selects none of the net's parameters.{hint}\n"
        f"  The net has: {', '.join(parameters) or 'no parameters'}."
    )


def _rules(where: Where | Sequence[Where] | None) -> Sequence[Where | None]:
    if isinstance(where, Sequence) and not isinstance(where, str):
        return where
    return [where]


def _predicate(rule: Where | None) -> _Rule:
    if rule is None:
        return _is_weight
    if isinstance(rule, str):
        return lambda name, parameter, module: fnmatch.fnmatchcase(name, rule)
    if isinstance(rule, type) and issubclass(rule, nn.Module):
        return lambda name, parameter, module: isinstance(module, rule) and parameter.dim() >= 2
    if callable(rule) and not isinstance(rule, (type, nn.Module)):
        check_takes("where", rule, "the name", "the parameter")
        return lambda name, parameter, module: rule(name, parameter)
    raise TypeError(
        "where must be a name pattern, a module type, a predicate of name and parameter, or a list "
        f"of these, but holds {rule!r}."
    )


def _is_weight(name: str, parameter: Tensor, module: nn.Module) -> bool:
    return (
        parameter.requires_grad
        and parameter.dim() >= 2
        and not isinstance(module, _NORMALISATION)
        and not name.rpartition(".")[2].startswith("bias")
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
