"""What ``fit`` refuses before it trains: data that model or likelihood cannot take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bayes_svdo.inference.batches import Batches, check_finite
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.posterior import Posterior
from bayes_svdo.models import BayesianNetwork

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
        self.name = name
        self.likelihood: Any = None
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
        if self.likelihood is not None:
            self.likelihood.check(batch[1], self.output, f"{self.name} y")

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
        except Exception as error:
            if isinstance(x, Tensor):
                shown = f"shape {tuple(x.shape)}, dtype {x.dtype}"
                hint = _hint(x, posterior)
            else:
                shown, hint = f"type {type(x).__name__}", ""
            raise ValueError(
                f"the network cannot take {self.name} x of {shown} (a batch): "
                f"{error.__cause__ or error}{hint}"
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
    """Refuse a guide that was made for another model.

    Raises:
        ValueError: The sites, or their shapes, are not the model's.
    """
    if not guide.sites:
        raise ValueError("the model has no latent site: there is nothing to fit.")
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


@torch.no_grad()
def check_parameters(objective: nn.Module, batch: tuple[Any, ...]) -> None:
    """Refuse ``pyro.param`` statements that no module holds: the optimizer would not see them.

    Raises:
        ValueError: Names the parameter.
    """
    with poutine.trace(param_only=True) as captured:
        objective(torch.ones(()), *batch)
    own = {id(parameter) for parameter in objective.parameters()}
    nodes: dict[str, Any] = captured.trace.nodes
    for name, site in nodes.items():
        if id(site["value"].unconstrained()) not in own:
            raise ValueError(
                f'the model has a parameter "{name}" of Pyro\'s global store, which fit would not '
                "train.\n  Try a PyroModule with a PyroParam, or Pyro's own SVI."
            )


def _hint(x: Tensor, posterior: Posterior) -> str:
    dtype = next(posterior.guide.parameters()).dtype
    if x.dtype == dtype:
        return ""
    return f"\n  Try x.to({dtype}), the dtype of the network's weights, if x holds numbers."
