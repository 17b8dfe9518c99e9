"""One graph of a Pyro objective: traced through Pyro, rewritten, and made machine code.

The graph holds the objective *and* its gradient (both go through ``make_fx``), so nothing of Pyro,
of the tensor subclass or of autograd is left in a step, and what remains is fused: the passes over
the weights above all. Random numbers are drawn anew by every call, from torch's generators.
"""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

import bayes_svdo
from bayes_svdo.distributions.special import fused
from bayes_svdo.inference.checks import check_parameters
from bayes_svdo.inference.objective import Objective
from bayes_svdo.inference.posterior import local_parameters
from bayes_svdo.inference.surroundings import pyro_checks, random_numbers_kept


class UntraceableError(RuntimeError):
    """A model, guide or likelihood whose computation cannot become one graph."""


class Numbers(NamedTuple):
    """What may change with every step without another graph: 0-dimensional, float64."""

    kl_weight: Tensor
    data_weight: Tensor
    scale: Tensor


class Graph(NamedTuple):
    """What a signature was compiled to.

    Attributes:
        run: ``(*state, kl_weight, data_weight, scale, *tensors)`` to loss, terms, score and
            gradients.
        trained: The parameters that get a gradient.
        frozen: All other parameters.
        state: The trained and the frozen ones, and buffers, which may be written to.
    """

    run: Callable[..., Any]
    trained: list[Tensor]
    frozen: list[Tensor]
    state: list[Tensor]

    def trains_the_same(self) -> bool:
        """Whether all that get a gradient want one, and no others."""
        return all(value.requires_grad for value in self.trained) and not any(
            value.requires_grad for value in self.frozen
        )

    def evaluate(self, numbers: Numbers, leaves: list[Any]) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Loss, terms, score, and the list of gradients."""
        on_cuda = numbers.scale.is_cuda
        if on_cuda:
            torch.compiler.cudagraph_mark_step_begin()
        with _autocast_traced(numbers.scale.device.type):
            loss, terms, score, *gradients = self.run(*self.state, *numbers, *_tensors(leaves))
        if on_cuda:  # the next step's results come to the same memory
            return loss.clone(), terms.clone(), score.clone(), gradients
        return loss, terms, score, gradients


def make_graph(
    objective: Objective,
    numbers: Numbers,
    batch: tuple[Any, ...],
    size: int | None,
    backend: str | Callable[..., Any],
) -> Graph:
    """Trace an objective for batches like this one, and compile the graph.

    Args:
        objective: The objective; its parameters are used in place.
        numbers: What the graph is given in place of the objective's own numbers.
        batch: An example.
        size: Size of the batch, to have it stand for itself alone in the graph; None if the model's
            own ``num_data`` is to be a constant there.
        backend: For ``torch.compile``.

    Raises:
        UntraceableError: Control flow depends on the values of data or weights, a value is read
            back, or the graph would hold a constant in place of what changes; with the reason.
    """
    parameters: dict[str, Tensor] = dict(objective.named_parameters())
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    frozen = {name: value for name, value in parameters.items() if not value.requires_grad}
    fixed = frozen | dict(objective.named_buffers())
    leaves, spec = tree_flatten(batch)

    def run(*inputs: Tensor) -> list[Tensor]:
        given = iter(inputs)
        own = [next(given).detach().requires_grad_() for _ in trained]
        state = dict(zip(trained, own, strict=True)) | {name: next(given) for name in fixed}
        numbers = Numbers(next(given), next(given), next(given))
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
    inputs = [*numbers, *_tensors(leaves)]
    try:
        with local_parameters(), pyro_checks(structure=True):
            _try(objective, batch, fixed)
        with local_parameters(), pyro_checks(structure=False), _without_onednn(), fused():
            trace = make_fx(
                run,
                decomposition_table=_DECOMPOSITIONS,
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )
            graph = trace(*state, *inputs)
    except UntraceableError:
        raise
    except Exception as error:
        raise UntraceableError(
            f"the objective cannot be compiled into one graph: {_reason(error)}\n"
            "  Try compile=False, or a model whose control flow does not depend on the values "
            "of data or weights."
        ) from error
    with (
        pyro_checks(structure=False),
        warnings.catch_warnings(),
        _autocast_traced(numbers.scale.device.type),
    ):
        # The checks are put back, which torch.compile turns off for good; and of what torch
        # will give up its users need not hear.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            compiled = _compiled(graph, state, inputs, backend)
        except Exception as error:
            raise UntraceableError(
                f"the objective's graph cannot be made machine code: {type(error).__name__}: "
                f"{error}\n  Try compile=False; or, if a compilation was interrupted, to delete "
                "what is in the folder that TORCHINDUCTOR_CACHE_DIR names (if it is not set: "
                "torchinductor_<user>, where temporary files are)."
            ) from error
    return Graph(compiled, list(trained.values()), list(frozen.values()), state)


def _try(objective: Objective, batch: tuple[Any, ...], fixed: dict[str, Tensor]) -> None:
    """Run as it is: a weight that is used twice is found, and sites get their names.

    torch's random numbers and buffers stay as they were.

    Raises:
        UntraceableError: A graph would hold constants in place of what changes from step to step:
            parameters of Pyro's store, random numbers that are not torch's, counters.
    """
    device = objective.guide.location_parameters()[0].device
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    losses = []
    for _ in range(3):  # the first may find weights that are used twice, and start again
        copies = {name: value.detach().clone() for name, value in fixed.items()}
        with random_numbers_kept(device):
            value = check_parameters(objective, batch, copies, error=UntraceableError)
        losses.append(float(value.loss))
    after = random.getstate(), np.random.get_state()  # noqa: NPY002
    for name, one, other in zip(("random", "numpy.random"), before, after, strict=True):
        if repr(one) != repr(other):
            raise UntraceableError(
                f"the objective draws random numbers from {name}, which would be the same in "
                "every step of a graph.\n  Try compile=False, or torch's random numbers."
            )
    coarse = torch.is_autocast_enabled(device.type)  # a GPU sums in any order
    if abs(losses[1] - losses[2]) > (1e-2 if coarse else 1e-4) * abs(losses[1]):
        raise UntraceableError(
            f"the objective is {losses[1]:.7g} and then {losses[2]:.7g} for one batch and the same "
            "of torch's random numbers: it draws others, or changes from call to call, and a graph "
            "would repeat what it saw.\n  Try compile=False, or torch's random numbers."
        )


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
    value = x.relu() + value
    return value if beta == 1 else value / beta


# Both begin with one exponential, which a graph that has both computes once.
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.sigmoid.default: _sigmoid,
    torch.ops.aten.sigmoid_.default: lambda x: x.copy_(_sigmoid(x)),
    torch.ops.aten.softplus.default: _softplus,
}

_CONTRACTION = "cpp.enable_floating_point_contract_flag"


def _contraction() -> str | bool:
    """Products and sums in one instruction, as on a GPU: fewer, and rounded once."""
    was: object = torch._inductor.config.cpp.enable_floating_point_contract_flag
    return True if isinstance(was, bool) else "fast"  # of older torch, or newer


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
                graph, inputs, options={"fallback_random": True, _CONTRACTION: _contraction()}
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
    objective: Objective, numbers: Numbers, size: int | None
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
    if isinstance(error, DataDependentOutputException) or "SymInt" in what:
        what = 'a value is read back from a tensor ("for i in pyro.plate" does so, "with" does not)'
    library = tuple(path for module in (torch, pyro, bayes_svdo) for path in module.__path__)
    lines = [
        f'\n  at line {frame.lineno} of "{frame.filename}": {frame.line}'
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(library) and Path(frame.filename).exists()
    ]
    return what + "".join(lines[-1:])


def _tensors(leaves: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
