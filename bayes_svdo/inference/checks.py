"""What ``fit`` refuses before it trains: data that model or likelihood cannot take."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.distributions import Independent
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from bayes_svdo.distributions import LogUniform
from bayes_svdo.inference.batches import Batches, check_finite
from bayes_svdo.inference.data_sites import check_sites
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.objective import Objective, ObjectiveValue
from bayes_svdo.inference.posterior import Posterior, dtype_hint
from bayes_svdo.inference.surroundings import random_numbers_kept
from bayes_svdo.models import BayesianNetwork
from bayes_svdo.models.bayesian_network import OutputError

_FEW = 2


class BatchCheck:
    """Refuses batches that a model cannot be trained on.

    Args:
        posterior: The model, and the guide that weights come from.
        batches: The data.
        first: A batch of them.
        name: What to call the data in error messages.

    Raises:
        TypeError, ValueError: The first batch, or the targets that are at hand, cannot be used.
    """

    def __init__(
        self, posterior: Posterior, batches: Batches, first: tuple[Any, ...], name: str
    ) -> None:
        self.name, self.posterior = name, posterior
        self.likelihood: Any = None
        self.shapes = _row_shapes(first)
        model = posterior.model
        if isinstance(model, BayesianNetwork):
            if len(first) != 2:
                raise TypeError(
                    f"{name} must give pairs (x, y), but gives {len(first)} elements a batch."
                )
            self._check_num_data(model, batches)
            self.output = self._output(posterior, first[0])
            self.likelihood = model.likelihood
            if batches.targets is not None:
                self.likelihood.check(batches.targets, self.output, f"{name} y")
        self(first, 1)

    def __call__(self, batch: tuple[Any, ...], number: int) -> None:
        """Check a batch, the ``number``-th of the epoch."""
        check_batch(batch, self.name, number)
        shapes = _row_shapes(batch)
        if shapes != self.shapes:  # sequences of another length may be welcome
            self._check_shapes(batch, number)
            self.shapes = shapes
        if self.likelihood is not None:
            try:
                self.likelihood.check(batch[1], self.output, f"{self.name} y")
            except (TypeError, ValueError) as error:
                raise type(error)(f"batch {number}: {error}") from error

    def _check_shapes(self, batch: tuple[Any, ...], number: int) -> None:
        """Refuse a batch of other widths than the last one, if the model cannot take it."""
        model = self.posterior.model
        try:
            if isinstance(model, BayesianNetwork):
                self.output = self._output(self.posterior, batch[0])
            else:
                check_sites(model, self.posterior.guide, batch)
        except Exception as error:
            cause = str(error).partition("\nTrace Shapes:")[0].strip()
            raise ValueError(
                f"batch {number} of {self.name} has data points of {_shown(_row_shapes(batch))}, "
                f"those before of {_shown(self.shapes)}; the model cannot take it: {cause}"
            ) from error

    def _check_num_data(self, model: BayesianNetwork, batches: Batches) -> None:
        if self.name != "train" or batches.num_data in (None, model.num_data):
            return
        raise ValueError(
            f"the model was made with num_data={model.num_data}, but {self.name} holds "
            f"{batches.num_data} data points.\n"
            f"  Try BayesianNetwork(..., num_data={batches.num_data})."
        )

    def _output(self, posterior: Posterior, x: Any) -> Tensor:
        """The network's output for the first few inputs."""
        try:
            few = tuple(value[:_FEW] for value in x) if isinstance(x, tuple) else x[:_FEW]
            return posterior.output(few)
        except OutputError:
            raise
        except Exception as error:
            if isinstance(x, Tensor):
                shown = f"shape {tuple(x.shape)}, dtype {x.dtype}"
                hint = dtype_hint(x, next(posterior.guide.parameters()).dtype)
            else:
                shown, hint = f"type {type(x).__name__}", ""
            raise ValueError(
                f"the network cannot take {self.name} x of {shown} (a batch): "
                f"{error.__cause__ or error}{hint}"
            ) from error


def _row_shapes(batch: tuple[Any, ...]) -> list[list[tuple[int, ...]]]:
    """The shape of one data point, of all tensors of each element of a batch."""
    return [
        [tuple(leaf.shape[1:]) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        for value in batch
    ]


def _shown(shapes: list[list[tuple[int, ...]]]) -> str:
    return ", ".join(
        f"{letter} {' '.join(map(str, each))}" for letter, each in zip("xy", shapes, strict=False)
    )


def check_model(model: object, batch: tuple[Any, ...]) -> None:
    """Refuse a model that does not take the elements of a batch, such as a network alone.

    Raises:
        TypeError: As said.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, but is a {type(model).__name__}.")
    if isinstance(model, BayesianNetwork):
        return
    try:
        signature(model.forward if isinstance(model, nn.Module) else model).bind(*batch)
    except TypeError as error:
        name = getattr(model, "__name__", type(model).__name__)
        raise TypeError(
            f"model must take the {len(batch)} elements of a batch, (x, y), but {name} cannot: "
            f"{error}.{_lift(model)}"
        ) from None
    except ValueError:  # has no signature
        pass


def check_last_batch(posterior: Posterior, batches: Batches, first: tuple[Any, ...]) -> None:
    """Refuse a last batch of one data point where batch normalisation needs more.

    Raises:
        ValueError: As said.
    """
    network = posterior.model
    if batches.last_size != 1 or not isinstance(network, BayesianNetwork):
        return
    if not any(isinstance(module, _BatchNorm) for module in network.net.modules()):
        return
    one = tree_map(lambda value: value[:1] if isinstance(value, Tensor) else value, first[0])
    net = deepcopy(network.net).train()
    try:
        with torch.no_grad(), random_numbers_kept(posterior.device):
            weights = posterior.means(math.inf)
            functional_call(net, weights, one if isinstance(one, tuple) else (one,))
    except ValueError as error:
        count, size = batches.num_data or 1, len(first[-1])
        better = next((n for n in range(size + 1, count + 1) if count % n != 1), None)
        raise ValueError(
            "the last batch of train holds 1 data point, on which batch normalisation cannot be "
            f"trained: {error}" + (f"\n  Try batch_size={better}." if better else "")
        ) from error


def check_batch(batch: tuple[Any, ...], name: str, number: int) -> None:
    """Refuse a batch with NaN or inf, the ``number``-th of the epoch.

    Raises:
        ValueError: As said.
    """
    for letter, value in zip(("x", "y"), batch, strict=False):
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                check_finite(tensor, f"{name} {letter}, batch {number},")


def check_guide(model: Callable[..., Any], guide: AdditiveNoiseGuide) -> None:
    """Refuse a guide that was made for another model, and a KL that holds for alpha <= 1 alone.

    Raises:
        ValueError: The sites, or their shapes, are not the model's, or a prior has such a KL.
    """
    if not guide.sites:
        raise ValueError(f"the model has no latent site: there is nothing to fit.{_lift(model)}")
    for name, site in guide.prototype_trace.iter_stochastic_nodes():
        prior = site["fn"]
        while isinstance(prior, Independent):
            prior = prior.base_dist
        if isinstance(prior, LogUniform) and prior.kl == "kingma2015" and not prior.extrapolate:
            raise ValueError(
                f'at site "{name}", the prior is LogUniform("kingma2015"), whose KL holds for '
                "alpha <= 1 alone: training would stop where a weight gets there.\n"
                '  Try LogUniform() or LogUniform("exact"), which hold everywhere.'
            )
    if not isinstance(model, BayesianNetwork):
        return
    if guide.sites != model.sites:
        raise ValueError(f"guide is for the sites {guide.sites}, but the model has {model.sites}.")
    for name, weight in model.initial_weights().items():
        shape = guide.parameters_of(name)[0].shape
        if shape != weight.shape:
            raise ValueError(
                f'at site "{name}", guide has shape {tuple(shape)} but the model has '
                f"{tuple(weight.shape)}."
            )


def check_pruning(guide: AdditiveNoiseGuide) -> None:
    """Refuse to prune while training where no prior is scale-free.

    Raises:
        ValueError: As said.
    """
    if not guide.prunable_sites:
        raise ValueError(
            "prune_while_training needs a site whose prior is scale-free, but those of "
            f"{', '.join(guide.sites)} are proper: a large log alpha says nothing of relevance "
            "under them.\n  Try prior=LogUniform() or prior=EmpiricalBayes()."
        )


def freeze_unused(objective: Objective, batch: tuple[Any, ...]) -> None:
    """Train no parameter that the objective does not depend on: other ranks wait for its gradient.

    Random numbers and buffers stay as they were.
    """
    trained = [value for value in objective.parameters() if value.requires_grad]
    loss = objective.preview(*batch).loss
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    for value, gradient in zip(trained, gradients, strict=True):
        value.requires_grad_(gradient is not None)


@torch.no_grad()
def check_parameters(
    objective: nn.Module,
    batch: tuple[Any, ...],
    state: dict[str, Tensor] | None = None,
    error: type[Exception] = ValueError,
) -> ObjectiveValue:
    """Evaluate an objective once, and refuse parameters of Pyro's store that no module holds.

    Args:
        objective: The objective.
        batch: What it is evaluated on.
        state: Parameters and buffers to evaluate it with, in place of its own.
        error: What to raise.

    Returns:
        What the objective is, at full weight.

    Raises:
        ValueError: Or another ``error``; names the parameter.
    """
    state = state or {}
    with poutine.trace(param_only=True) as captured:
        found: ObjectiveValue = functional_call(objective, state, (torch.ones(()), *batch))
    held = {id(value) for value in (*objective.parameters(), *state.values())}
    nodes: dict[str, Any] = captured.trace.nodes
    for name, site in nodes.items():
        if id(site["value"].unconstrained()) not in held:
            raise error(
                f'parameter "{name}" of Pyro\'s global store is held by no module of the model or '
                "the guide: fit would not train it, and a graph would take it for a constant.\n"
                "  Try a PyroModule as model, with the network or a PyroParam as attribute; or "
                "Pyro's own SVI."
            )
    return found


def _lift(model: object) -> str:
    if not isinstance(model, nn.Module):
        return ""
    return "\n  Try BayesianNetwork(net, likelihood, num_data), if this is a network."
