"""A compiled objective: one graph (:mod:`~.graphs`) for every signature of its inputs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from shutil import which
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten

from bayes_svdo.inference.arguments import check_weight
from bayes_svdo.inference.elbo import TraceAnalyticKL_ELBO
from bayes_svdo.inference.graphs import Graph, Numbers, UntraceableError, make_graph
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.objective import Objective, ObjectiveValue
from bayes_svdo.models import BayesianNetwork
from bayes_svdo.models.likelihoods import Likelihood

__all__ = ["CompiledObjective", "UntraceableError", "compile_objective", "wants_compilation"]

# Every signature costs a compilation; of data with many shapes the rest runs as it is.
_MOST_SIGNATURES = 8
# A minute of compilation is worth some milliseconds off each of so many steps.
_WORTH_COMPILING = 10_000


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
            nothing, to compile when the first batch comes. A guide of a hand-written model that
            has not been called yet is set up for it.
        backend: For ``torch.compile``.

    Returns:
        A module with the parameters of model and guide.

    Raises:
        TypeError: ``elbo``, ``model`` or ``guide`` is something else.
        ValueError: The guide has not been called, and there is no example to call it with.
        UntraceableError: Control flow depends on the values of data or weights, or a value is read
            back; with the reason.
    """
    for name, value, kind in (
        ("elbo", elbo, TraceAnalyticKL_ELBO),
        ("guide", guide, AdditiveNoiseGuide),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be of the type {kind.__name__}, but is {value!r}.")
    if not callable(model):
        raise TypeError(f"model must be a Pyro model, which is called, but is {model!r}.")
    if guide.prototype_trace is None:
        if not example_batch:
            raise ValueError(
                "guide has no parameters before its first call.\n"
                "  Try compile_objective(elbo, model, guide, x, y), with a batch of the data."
            )
        guide(*example_batch)
    compiled = CompiledObjective(Objective(model, guide, elbo), backend)
    if example_batch:
        compiled.prepare(*example_batch)
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


class _Given(NamedTuple):
    """A batch: as the model takes it, what it holds in which structure, and its size.

    The size is that of a batch that can stand for itself, see :func:`make_graph`.
    """

    batch: tuple[Any, ...]
    leaves: list[Any]
    structure: str
    size: int | None


class CompiledObjective(nn.Module):
    """An :class:`Objective` that is traced and compiled, once for every signature of its inputs.

    The signature is the shapes, dtypes and devices of a batch, its values that are no tensors, the
    modules' training mode, and ``num_data`` where a likelihood of the user's own reads it: a last,
    smaller batch costs one more compilation. The KL's weight, the ELBO's own included, ``num_data``
    and the scale may change with every step; a parameter that is frozen, or no longer, costs
    another compilation. Whatever else the model reads, such as an attribute that a callback
    changes, is a constant of the graph; so is which tensors the parameters are: where one is put in
    another's place, or all get another dtype, after the first batch, make a new object of this
    class. From the ninth signature on, new ones are evaluated as they are, with a warning. When
    half of what is left of the weights has been zeroed for good, rows and columns that are dead
    leave the graphs, which are compiled anew. Without gradients (``torch.no_grad()``) nothing is
    compiled.

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
        self._graphs: dict[Any, Graph] = {}
        self._numbers: tuple[Any, Tensor, Tensor] | None = None
        self._gave_up = False
        self._layout = objective.guide.layout
        # torch finds a module's first parameter anew, in as long as a small layer takes.
        self._first: list[Tensor] = []
        model = objective.model  # a guide has no modes
        self._modes = list(model.modules()) if isinstance(model, nn.Module) else []

    def forward(self, kl_weight: float | Tensor, *batch: Any) -> ObjectiveValue:
        """One estimate on a batch, as by :class:`Objective`.

        Raises:
            TypeError, ValueError: ``kl_weight`` is no finite number of at least 0, nor a scalar
                tensor of one.
            UntraceableError: As :func:`compile_objective`, if that is required.
        """
        given = self._given(batch)
        graph = self._graph_for(given) if torch.is_grad_enabled() else None
        kl_weight = self._weight(kl_weight)
        if graph is None:
            value: ObjectiveValue = self.objective(kl_weight, *batch)
            return value
        numbers = self._numbers_of(kl_weight, given.size)
        loss, terms, score = _Evaluate.apply(graph, numbers, given.leaves, *graph.trained)
        return ObjectiveValue(loss, terms, score)

    def set_gradients(self, kl_weight: float | Tensor, *batch: Any) -> ObjectiveValue:
        """One estimate on a batch, its gradient in the parameters' ``grad``.

        As ``zero_grad()`` and ``backward()`` on the loss, without autograd's share of the time.
        Errors are those of :meth:`forward`.
        """
        given = self._given(batch)
        graph = self._graph_for(given)
        kl_weight = self._weight(kl_weight)
        if graph is None:
            self.zero_grad()
            with torch.enable_grad():
                value: ObjectiveValue = self.objective(kl_weight, *batch)
                value.loss.backward()
            return ObjectiveValue(value.loss.detach(), value.terms, value.score)
        for parameter in graph.trained:  # so that the new ones can have their memory
            parameter.grad = None
        numbers = self._numbers_of(kl_weight, given.size)
        with torch.no_grad():
            *values, gradients = graph.evaluate(numbers, given.leaves)
        for parameter, gradient in zip(graph.trained, gradients, strict=True):
            parameter.grad = gradient
        return ObjectiveValue(*values)

    def prepare(self, *batch: Any) -> Graph | None:
        """Compile for batches like this one, unless that is done; None if there are too many.

        Raises:
            UntraceableError: As :func:`compile_objective`.
        """
        return self._graph_for(self._given(batch))

    def _graph_for(self, given: _Given) -> Graph | None:
        layout = self.objective.guide.layout
        if layout != self._layout:  # it does not come back
            self._forget()
            self._layout = layout
        key = self._signature(given)
        graph = self._graphs.get(key)
        if graph is not None and not graph.trains_the_same():  # frozen since, or not any more
            for parameter in graph.trained:
                parameter.grad = None
            self._graphs.clear()
            graph = None
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
            with torch.enable_grad():
                graph = self._graphs[key] = make_graph(
                    self.objective,
                    self._numbers_of(self._weight(1.0), given.size),
                    given.batch,
                    given.size,
                    self.backend,
                )
        except UntraceableError as error:
            if self.required:
                raise
            self._give_up(str(error))
        return graph

    def _forget(self) -> None:
        self._graphs.clear()
        self._first.clear()
        self._numbers = None  # which are where the parameters were

    def _place(self) -> torch.device:
        if not self._first:
            self._first.append(next(self.objective.parameters()))
        return self._first[0].device

    def _weight(self, kl_weight: float | Tensor) -> Tensor:
        """As a graph takes it, which would misread any other: a double where the parameters are."""
        device = self._place()
        if not (
            isinstance(kl_weight, Tensor)
            and kl_weight.dtype == torch.float64
            and kl_weight.device == device
            and kl_weight.dim() == 0
        ):
            check_weight("kl_weight", kl_weight)
            kl_weight = torch.as_tensor(kl_weight, dtype=torch.float64, device=device)
        return kl_weight

    def _numbers_of(self, kl_weight: Tensor, size: int | None) -> Numbers:
        """What the graph of a batch of ``size``, which stands for itself alone, is given."""
        own, scale = self.objective.elbo.kl_weight, self.objective.scale
        if not (isinstance(own, float) and own == 1.0):
            kl_weight = (kl_weight * own).detach().to(kl_weight)
        ratio = 1.0 if size is None else self.objective.model.num_data / size
        if self._numbers is None or self._numbers[0] != (ratio, scale):
            made = (kl_weight.new_tensor(ratio), kl_weight.new_tensor(scale))
            self._numbers = ((ratio, scale), *made)
        return Numbers(kl_weight, *self._numbers[1:])

    def _given(self, batch: tuple[Any, ...]) -> _Given:
        if all(isinstance(value, Tensor) for value in batch):
            leaves, structure = list(batch), str(len(batch))
        else:
            leaves, spec = tree_flatten(batch)
            structure = str(spec)
        return _Given(batch, leaves, structure, self._free_size(batch))

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

    def _signature(self, given: _Given) -> Any:
        device = self._place().type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (
            tuple(
                [
                    (leaf.shape, leaf.dtype, leaf.device, leaf.stride())
                    if isinstance(leaf, Tensor)
                    else leaf
                    for leaf in given.leaves
                ]
            ),
            given.structure,
            tuple([module.training for module in self._modes]),
            getattr(self.objective.model, "num_data", None) if given.size is None else None,
            autocast,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()  # buffers are replaced
        super()._apply(fn, recurse)
        return self


class _Evaluate(torch.autograd.Function):
    """Runs a graph that has computed its gradient along with its value."""

    @staticmethod
    def forward(ctx: Any, graph: Graph, numbers: Numbers, leaves: Any, *trained: Tensor) -> Any:
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
