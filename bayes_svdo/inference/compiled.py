"""A Pyro objective as one graph: traced through Pyro once per input signature, then compiled.

The graph holds the objective *and* its gradient (both go through ``make_fx``), so nothing of Pyro,
of the tensor subclass or of autograd is left in a step, and what remains is fused: the passes over
the weights above all. Random numbers are drawn anew by every call, from torch's generators.
"""

from __future__ import annotations

import os
import random
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple, Self

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import bayes_svdo
from bayes_svdo.inference.elbo import TraceAnalyticKL_ELBO
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.objective import Objective, ObjectiveValue
from bayes_svdo.inference.posterior import local_parameters
from bayes_svdo.inference.surroundings import pyro_checks
from bayes_svdo.models import BayesianNetwork
from bayes_svdo.models.likelihoods import Likelihood

# Every signature costs a compilation; of data with many shapes the rest runs as it is.
_MOST_SIGNATURES = 8
# A minute of compilation is worth some milliseconds off each of so many steps.
_WORTH_COMPILING = 10_000


class UntraceableError(RuntimeError):
    """A model, guide or likelihood whose computation cannot become one graph."""


def compile_objective(
    elbo: TraceAnalyticKL_ELBO,
    model: Callable[..., Any],
    guide: AdditiveNoiseGuide,
    *example_batch: Any,
    backend: str | Callable[..., Any] = "inductor",
) -> CompiledObjective:
    """Compile an objective: ``compiled(kl_weight, *batch).loss.backward()`` is a step's gradient.

    Args:
        elbo: The objective.
        model: The model. Its parameters are used in place, not copied.
        guide: Its guide.
        *example_batch: What ``model`` is called with, to compile at once for batches of its shapes;
            nothing, to compile when the first batch comes.
        backend: For ``torch.compile``.

    Returns:
        A module with the parameters of model and guide.

    Raises:
        UntraceableError: Control flow depends on the values of data or weights, or a value is read
            back; with the reason.
    """
    compiled = CompiledObjective(Objective(model, guide, elbo), backend)
    if example_batch:
        compiled.prepare(torch.ones((), dtype=torch.float64), *example_batch)
    return compiled


def wants_compilation(choice: object, *, device: torch.device, precision: str, steps: int) -> bool:
    """Whether ``fit(compile=choice)`` compiles a run.

    Raises:
        ValueError: ``choice`` is none, or True where that cannot be.
    """
    if choice is False:
        return False
    if choice is not True and choice != "auto":
        raise ValueError(f'compile must be True, False or "auto", but is {choice!r}.')
    hindrance = None
    if precision == "16-mixed":
        hindrance = 'precision "16-mixed" scales the loss, which a compiled gradient comes after'
    elif device.type == "cpu" and not _has_compiler():
        hindrance = "there is no C++ compiler (g++, clang++, or what CXX names)"
    elif device.type == "cuda" and find_spec("triton") is None:
        hindrance = "there is no triton"
    if choice is True:
        if hindrance:
            raise ValueError(f"compile=True is not possible: {hindrance}.\n  Try compile=False.")
        return True
    return hindrance is None and steps >= _WORTH_COMPILING


def _has_compiler() -> bool:
    return any(map(which, [os.environ.get("CXX") or "g++", "clang++"]))


class _Numbers(NamedTuple):
    """What may change with every step without another graph: 0-dimensional, float64."""

    kl_weight: Tensor
    data_weight: Tensor
    scale: Tensor


class _Graph(NamedTuple):
    """What a signature was compiled to.

    Attributes:
        run: ``(*state, kl_weight, data_weight, scale, *tensors)`` to loss, terms, score and
            gradients.
        trained: The parameters that get a gradient.
        state: They, all other parameters, and buffers, which may be written to.
    """

    run: Callable[..., Any]
    trained: list[Tensor]
    state: list[Tensor]

    def evaluate(self, numbers: _Numbers, leaves: list[Any]) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Loss, terms, score, and the list of gradients."""
        on_cuda = numbers.scale.is_cuda
        if on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with _autocast_traced(numbers.scale.device.type):
            loss, terms, score, *gradients = self.run(*self.state, *numbers, *_tensors(leaves))
        if on_cuda:  # the next step's results come to the same memory
            return loss.clone(), terms.clone(), score.clone(), gradients
        return loss, terms, score, gradients


class CompiledObjective(nn.Module):
    """An :class:`Objective` that is traced and compiled, once for every signature of its inputs.

    The signature is the shapes, dtypes and devices of a batch, its values that are no tensors, the
    modules' training mode, and ``num_data`` where a likelihood of the user's own reads it: a last,
    smaller batch costs one more compilation. The KL's weight, the ELBO's own included, ``num_data``
    and the scale may change with every step. Whatever else the model reads, such as an attribute
    that a callback changes, is a constant of the graph. From the ninth signature on, new ones are
    evaluated as they are, with a warning. When half of what is left of the weights has been zeroed
    for good, rows and columns that are dead leave the graphs, which are compiled anew. Without
    gradients (``torch.no_grad()``) nothing is compiled.

    Args:
        objective: The objective.
        backend: For ``torch.compile``.
        required: Whether an objective that cannot be compiled is an error. If not, it is evaluated
            as it is from then on, with a warning that says why.
    """

    def __init__(
        self,
        objective: Objective,
        backend: str | Callable[..., Any] = "inductor",
        required: bool = True,
    ) -> None:
        super().__init__()
        self.objective: Objective = objective
        self.backend, self.required = backend, required
        self._graphs: dict[Any, _Graph] = {}
        self._numbers: tuple[Any, Tensor, Tensor] | None = None
        self._gave_up = False
        self._layout = objective.guide.layout
        model = objective.model  # a guide has no modes
        self._modes = list(model.modules()) if isinstance(model, nn.Module) else []

    def forward(self, kl_weight: Tensor, *batch: Any) -> ObjectiveValue:
        """One estimate on a batch, as by :class:`Objective`."""
        graph = self.prepare(kl_weight, *batch) if torch.is_grad_enabled() else None
        if graph is None:
            value: ObjectiveValue = self.objective(kl_weight, *batch)
            return value
        numbers = self._numbers_of(kl_weight, batch)
        loss, terms, score = _Evaluate.apply(graph, numbers, tree_leaves(batch), *graph.trained)
        return ObjectiveValue(loss, terms, score)

    @torch.no_grad()
    def set_gradients(self, kl_weight: Tensor, *batch: Any) -> ObjectiveValue:
        """One estimate on a batch, its gradient in the parameters' ``grad``.

        As ``zero_grad()`` and ``backward()`` on the loss, without autograd's share of the time.
        """
        with torch.enable_grad():
            graph = self.prepare(kl_weight, *batch)
        if graph is None:
            self.zero_grad()
            with torch.enable_grad():
                value: ObjectiveValue = self.objective(kl_weight, *batch)
            value.loss.backward()
            return value
        for parameter in graph.trained:  # so that the new ones can have their memory
            parameter.grad = None
        *values, gradients = graph.evaluate(self._numbers_of(kl_weight, batch), tree_leaves(batch))
        for parameter, gradient in zip(graph.trained, gradients, strict=True):
            parameter.grad = gradient
        return ObjectiveValue(*values)

    def prepare(self, kl_weight: Tensor, *batch: Any) -> _Graph | None:
        """Compile for batches like this one, unless that is done; None if there are too many.

        Raises:
            UntraceableError: As :func:`compile_objective`.
        """
        layout = self.objective.guide.layout
        if layout != self._layout:  # it does not come back
            self._graphs.clear()
            self._layout = layout
        key = self._signature(batch)
        graph = self._graphs.get(key)
        if graph is not None or self._gave_up:
            return graph
        if len(self._graphs) == _MOST_SIGNATURES:
            self._give_up(
                f"batches have had {_MOST_SIGNATURES} different shapes, each of which was "
                "compiled; those of others are evaluated without.\n"
                "  Try batches of equal shape, for example by padding."
            )
            return None
        try:
            graph = self._graphs[key] = self._compile(kl_weight, batch)
        except UntraceableError as error:
            if self.required:
                raise
            self._give_up(str(error))
        return graph

    def _numbers_of(self, kl_weight: Tensor, batch: tuple[Any, ...]) -> _Numbers:
        """What the graph of a batch, which stands for itself alone, is given."""
        own, scale = self.objective.elbo.kl_weight, self.objective.scale
        if not (isinstance(own, float) and own == 1.0):
            kl_weight = (kl_weight * own).detach().to(kl_weight)
        size = self._free_size(batch)
        ratio = 1.0 if size is None else self.objective.model.num_data / size
        if self._numbers is None or self._numbers[0] != (ratio, scale):
            made = (kl_weight.new_tensor(ratio), kl_weight.new_tensor(scale))
            self._numbers = ((ratio, scale), *made)
        return _Numbers(kl_weight, *self._numbers[1:])

    def _free_size(self, batch: tuple[Any, ...]) -> int | None:
        """Size of the batch if it can stand for itself; None if ``num_data`` is in the graph."""
        model = self.objective.model
        if not isinstance(model, BayesianNetwork) or type(model).forward != BayesianNetwork.forward:
            return None
        kind = type(model.likelihood)
        own = kind.forward != Likelihood.forward or kind._observe != Likelihood._observe
        if own or len(batch) != 2 or not isinstance(batch[1], Tensor):
            return None
        size = len(batch[1]) if batch[1].dim() else 0
        return size if 0 < size <= model.num_data else None

    def _give_up(self, why: str) -> None:
        """Compile nothing more, and say so once."""
        self._gave_up = True
        warnings.warn(why, stacklevel=4)

    def _signature(self, batch: tuple[Any, ...]) -> Any:
        leaves, spec = tree_flatten(batch)
        device = self.objective.guide.location_parameters()[0].device.type
        free = self._free_size(batch)
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (
            tuple(
                (leaf.shape, leaf.dtype, leaf.device, leaf.stride())
                if isinstance(leaf, Tensor)
                else leaf
                for leaf in leaves
            ),
            str(spec),
            tuple([module.training for module in self._modes]),
            getattr(self.objective.model, "num_data", None) if free is None else None,
            autocast,
        )

    def _compile(self, kl_weight: Tensor, batch: tuple[Any, ...]) -> _Graph:
        objective = self.objective
        parameters: dict[str, Tensor] = dict(objective.named_parameters())
        trained = {name: value for name, value in parameters.items() if value.requires_grad}
        fixed = {name: value for name, value in parameters.items() if not value.requires_grad}
        fixed |= dict(objective.named_buffers())
        leaves, spec = tree_flatten(batch)
        size = self._free_size(batch)

        def run(*inputs: Tensor) -> list[Tensor]:
            given = iter(inputs)
            own = [next(given).detach().requires_grad_() for _ in trained]
            state = dict(zip(trained, own, strict=True)) | {name: next(given) for name in fixed}
            numbers = _Numbers(next(given), next(given), next(given))
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args = (numbers.kl_weight, *tree_unflatten(filled, spec))
            with _standing_for_itself(objective, numbers, size):
                value = functional_call(objective, state, args)
            with torch.autocast(value.loss.device.type, enabled=False):
                gradients = torch.autograd.grad(
                    value.loss, own, allow_unused=True, materialize_grads=True
                )
            return [*value, *_apart(gradients)]

        state = [*trained.values(), *fixed.values()]
        inputs = [*self._numbers_of(kl_weight, batch), *_tensors(leaves)]
        try:
            with local_parameters(), pyro_checks(structure=True):
                self._try(kl_weight, batch, fixed)
            with (
                local_parameters(),
                pyro_checks(structure=False),
                _without_onednn(),
            ):
                trace = make_fx(
                    run,
                    decomposition_table=_DECOMPOSITIONS,
                    tracing_mode="fake",
                    _allow_non_fake_inputs=True,
                )
                graph = trace(*state, *inputs)
            with (
                pyro_checks(structure=False),
                warnings.catch_warnings(),
                _autocast_traced(kl_weight.device.type),
            ):
                # The checks are put back, which torch.compile turns off for good; and of what torch
                # will give up its users need not hear.
                warnings.simplefilter("ignore", DeprecationWarning)
                compiled = _compiled(graph, state, inputs, self.backend)
        except UntraceableError:
            raise
        except Exception as error:
            raise UntraceableError(
                f"the objective cannot be compiled into one graph: {_reason(error)}\n"
                "  Try compile=False, or a model whose control flow does not depend on the values "
                "of data or weights."
            ) from error
        return _Graph(compiled, list(trained.values()), state)

    @torch.no_grad()
    def _try(self, kl_weight: Tensor, batch: tuple[Any, ...], fixed: dict[str, Tensor]) -> None:
        """Run once as it is: a weight that is used twice is found, and sites get their names.

        torch's random numbers and buffers stay as they were.

        Raises:
            UntraceableError: A graph would hold constants in place of what changes from step to
                step: parameters of Pyro's store, or random numbers that are not torch's.
        """
        copies = {name: value.clone() for name, value in fixed.items()}
        device = self.objective.guide.location_parameters()[0].device
        before = random.getstate(), np.random.get_state()  # noqa: NPY002
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            poutine.trace(param_only=True) as captured,
        ):
            functional_call(self.objective, copies, (kl_weight, *batch))
        after = random.getstate(), np.random.get_state()  # noqa: NPY002
        for name, one, other in zip(("random", "numpy.random"), before, after, strict=True):
            if repr(one) != repr(other):
                raise UntraceableError(
                    f"the objective draws random numbers from {name}, which would be the same in "
                    "every step of a graph.\n  Try compile=False, or torch's random numbers."
                )
        own = {id(value) for value in (*self.objective.parameters(), *copies.values())}
        nodes: dict[str, Any] = captured.trace.nodes
        for name, site in nodes.items():
            if id(site["value"].unconstrained()) not in own:
                raise UntraceableError(
                    f'parameter "{name}" of Pyro\'s global store is held by no module of the model '
                    "or the guide, so that it would be a constant of the graph.\n"
                    "  Try a PyroModule as model, with the network or a PyroParam as attribute."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._graphs.clear()  # buffers are replaced
        super()._apply(fn, recurse)
        return self


class _Evaluate(torch.autograd.Function):
    """Runs a graph that has computed its gradient along with its value."""

    @staticmethod
    def forward(ctx: Any, graph: _Graph, numbers: _Numbers, leaves: Any, *trained: Tensor) -> Any:
        loss, terms, score, ctx.gradients = graph.evaluate(numbers, leaves)
        ctx.mark_non_differentiable(terms, score)
        return loss, terms, score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradient of a compiled objective can be had once.\n"
                "  Try evaluating the objective again."
            )
        # Kept by nobody else, they become the parameters' gradients without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if grad_loss.device.type == "cpu":
            if float(grad_loss) != 1.0:
                torch._foreach_mul_(gradients, grad_loss)
            return None, None, None, *gradients
        # In memory that is the graph's own.
        return None, None, None, *torch._foreach_mul(gradients, grad_loss)


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors that share no memory: two terms of a sum have one gradient between them."""
    seen: set[Any] = set()
    result = []
    for tensor in tensors:
        storage = tensor.untyped_storage()._cdata
        result.append(tensor.clone() if storage in seen else tensor)
        seen.add(storage)
    return result


def _sigmoid(x: Tensor) -> Tensor:
    small = (-x.abs()).exp()
    return torch.where(x >= 0, 1.0, small) / (1 + small)


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """``log(1 + exp(beta x)) / beta``, exact to rounding for any threshold."""
    x = x if beta == 1 else beta * x
    small = (-x.abs()).exp()
    if x.dtype == torch.float64:
        value = small.log1p()
    else:  # by the series of 2 artanh(ratio), in a third of the time; the next term is 1.4e-8
        ratio = small / (2 + small)
        square = ratio * ratio
        series = torch.full_like(square, 1 / 13)
        for power in (11, 9, 7, 5, 3, 1):
            series = series * square + 1 / power
        value = 2 * ratio * series
    value = x.clamp_min(0) + value
    return value if beta == 1 else value / beta


# Both begin with one exponential, which a graph that has both computes once.
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.sigmoid.default: _sigmoid,
    torch.ops.aten.softplus.default: _softplus,
}


def _compiled(
    graph: torch.fx.GraphModule,
    state: list[Tensor],
    given: list[Tensor],
    backend: str | Callable[..., Any],
) -> Callable[..., Any]:
    """The graph as machine code."""
    if backend == "inductor" and given[0].device.type == "cpu":
        # There is nothing left that torch.compile's guards, which cost as much as a small layer,
        # could guard against. Inductor's own random numbers cost ten times torch's.
        with torch.no_grad():
            inputs: list[Any] = [value.detach() for value in (*state, *given)]
            run: Callable[..., Any] = torch._inductor.compile(
                graph, inputs, options={"fallback_random": True}
            )
        return run
    options: dict[str, Any] | None = None
    if backend == "inductor":
        options = {"triton.cudagraphs": True}
        for tensor in state:
            torch._dynamo.mark_static_address(tensor)  # else copied for every step
    return torch.compile(graph, backend=backend, dynamic=False, options=options)


@contextmanager
def _standing_for_itself(
    objective: Objective, numbers: _Numbers, size: int | None
) -> Iterator[None]:
    """The objective with ``numbers`` in place of its own, and a batch of its own data."""
    elbo, model = objective.elbo, objective.model
    own = elbo.kl_weight, objective.scale, getattr(model, "num_data", None)
    elbo.kl_weight, objective.scale = 1.0, numbers.scale
    if size is not None:
        model.num_data, objective.data_weight = size, numbers.data_weight
    try:
        yield
    finally:
        elbo.kl_weight, objective.scale, num_data = own
        if size is not None:
            model.num_data, objective.data_weight = num_data, None


def _autocast_traced(device_type: str) -> AbstractContextManager[Any]:
    """No autocast: its casts are in the graph, and made again they would reach the variances."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Its recurrent layers have a backward pass that cannot be traced; torch's own can."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _reason(error: Exception) -> str:
    """What went wrong, and the line of the user's own code that led there."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, DataDependentOutputException):
        what = "a value is read back from a tensor"
    library = tuple(path for module in (torch, pyro, bayes_svdo) for path in module.__path__)
    lines = [
        f'\n  at line {frame.lineno} of "{frame.filename}": {frame.line}'
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(library) and Path(frame.filename).exists()
    ]
    return what + "".join(lines[-1:])


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
