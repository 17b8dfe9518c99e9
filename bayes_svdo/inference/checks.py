"""What ``fit`` refuses before it trains: data that model or likelihood cannot take."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.distributions import Independent
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.random import fork_rng
from torch.utils._pytree import tree_leaves, tree_map

from bayes_svdo.distributions import LogUniform
from bayes_svdo.inference.batches import Batches, check_finite
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.posterior import Posterior, dtype_hint
from bayes_svdo.inference.surroundings import pyro_checks
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
                with torch.no_grad(), fork_rng(), _buffers_kept(model):
                    _sites(model, self.posterior.guide(*batch), batch)
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
    device = posterior.device
    try:
        with torch.no_grad(), fork_rng([device] if device.type == "cuda" else []):
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


def freeze_unused(objective: nn.Module, batch: tuple[Any, ...]) -> None:
    """Train no parameter that the objective does not depend on: other ranks wait for its gradient.

    Random numbers and buffers stay as they were.
    """
    trained = [value for value in objective.parameters() if value.requires_grad]
    buffers = {name: value.clone() for name, value in objective.named_buffers()}
    weight = torch.ones((), dtype=torch.float64, device=trained[0].device)
    with (
        fork_rng([weight.device] if weight.is_cuda else []),
        pyro_checks(structure=False),
    ):
        loss = functional_call(objective, buffers, (weight, *batch)).loss
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    for value, gradient in zip(trained, gradients, strict=True):
        value.requires_grad_(gradient is not None)


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


@torch.no_grad()
def check_scale(
    model: Any, guide: AdditiveNoiseGuide, batch: tuple[Any, ...], num_data: int | None
) -> None:
    """Refuse a model written by hand that takes a batch for something else than it is.

    One that observes nothing has no data to be fitted to. Variables of its own for each data point
    would be fitted to others, for ``fit`` shuffles. And where a batch of ``M`` points does not
    count as all ``num_data``, the KL is too strong or too weak.

    Raises:
        ValueError: Names the site.
    """
    sites, of_data = _sites_of_data(model, guide, batch)
    latent = [name for name, site in sites.items() if not site["is_observed"]]
    if set(latent) != set(guide.sites):
        raise ValueError(
            f"guide is for the sites {', '.join(guide.sites)}, but the model has "
            f"{', '.join(latent) or 'none'}."
        )
    for name in latent:
        if name not in of_data:
            guide.check_shape(sites[name])
    if not any(site["is_observed"] for site in sites.values()):
        raise ValueError(
            f"the model observes nothing: it has the latent sites {', '.join(sites)} alone, which "
            "would be fitted to no data.\n  Try obs=y in the pyro.sample statement of the data."
        )
    if guide.create_plates is None:  # else it says which rows of the guide a batch is of
        for name in of_data:
            if not sites[name]["is_observed"]:
                raise _local(name, sites[name])
    for name in of_data:
        if num_data is not None and sites[name]["is_observed"]:
            _check_scale_of(name, sites[name], len(batch[-1]), num_data)


def _local(name: str, site: dict[str, Any]) -> ValueError:
    plates = [frame.name for frame in site["cond_indep_stack"] if frame.vectorized]
    what = f'plate "{plates[-1]}" gives every data point' if plates else "every data point has"
    return ValueError(
        f'at site "{name}", {what} a variable of its own, but fit shuffles the data: each would be '
        "fitted to other points.\n"
        "  Try obs=y, if it is the data; else pyro.infer.SVI with TraceAnalyticKL_ELBO and the "
        "data in their order, or a model with this variable integrated out."
    )


def _check_scale_of(name: str, site: dict[str, Any], size: int, num_data: int) -> None:
    """Refuse a site of ``size`` data points that does not count as ``num_data``."""
    scale = torch.as_tensor(site["scale"], dtype=torch.float64)
    if not _equal(scale, float(scale.flatten()[0])):
        # Weights of the user's own: if there is a plate, it must be right.
        frames: Any = site["cond_indep_stack"]
        plates = math.prod((frame.full_size or frame.size) / frame.size for frame in frames)
        if plates == 1:
            return
        scale = torch.tensor(plates, dtype=torch.float64)
    right = num_data / size
    if _equal(scale, right):
        return
    factor = right / float(scale.flatten()[0])
    wrong = f"{factor:.3g} times too much" if factor > 1 else f"{1 / factor:.3g} times too little"
    remedy = ", or batch_size=len(x)" if _equal(scale, 1.0) else ""
    raise ValueError(
        f'at site "{name}", a batch of {size} of the {num_data} data points counts as '
        f"{num_data / factor:.6g} points: the KL would count {wrong}.\n"
        f'  Try pyro.plate("data", {num_data}, subsample=torch.arange(len(x))) in the model'
        f"{remedy}. A weight of the KL on purpose is TraceAnalyticKL_ELBO(kl_weight=...)."
    )


def _equal(scale: Tensor, value: float) -> bool:
    return bool(((scale - value).abs() <= 1e-4 * abs(value)).all())


def _sites_of_data(
    model: Any, guide: AdditiveNoiseGuide, batch: tuple[Any, ...]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The model's sites for a batch, and the names of those that are of its data points.

    They are those that have fewer rows, or are not there, for fewer data points. A site or plate of
    something else, of outputs say, may be as long as the batch by chance.
    """
    with fork_rng(), _buffers_kept(model):
        weights: dict[str, Tensor] = guide(*batch)
        sites = _sites(model, weights, batch)
        fewer = tree_map(lambda v: v[:-1] if isinstance(v, Tensor) and v.dim() else v, batch)
        try:
            shorter = _sites(model, weights, fewer)
        except Exception:  # the model takes no other number of points than its plate has
            size = len(batch[-1])
            return sites, [name for name, site in sites.items() if size in _sizes(site)]
    return sites, [
        name
        for name, site in sites.items()
        if name not in shorter or _sizes(site) != _sizes(shorter[name])
    ]


def _sites(
    model: Any, weights: dict[str, Tensor], batch: tuple[Any, ...]
) -> dict[str, dict[str, Any]]:
    """The sample sites for a batch, at these weights, with zeros for what has another shape.

    Raises:
        ValueError: An observed value is not of the shape of its distribution.
    """

    def value_of(site: dict[str, Any]) -> Tensor:
        shape = site["fn"].shape()
        own = weights.get(site["name"], any_of_them)
        return own if own.shape == shape else own.new_zeros(shape)

    any_of_them = next(iter(weights.values()))

    trace: Any = poutine.trace(InitMessenger(value_of)(model)).get_trace(*batch)
    nodes: dict[str, Any] = prune_subsample_sites(trace).nodes
    sites = {
        name: site
        for name, site in nodes.items()
        if site["type"] == "sample" and not site["infer"].get("_deterministic")
    }
    for name, site in sites.items():
        if site["is_observed"] and not _broadcasts(site["value"].shape, site["fn"].shape()):
            raise ValueError(
                f'at site "{name}", obs has shape {tuple(site["value"].shape)}, but its '
                f"distribution has {tuple(site['fn'].shape())}."
            )
    return sites


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(
        own in (1, other) for own, other in zip(reversed(shape), reversed(to), strict=False)
    )


def _sizes(site: dict[str, Any]) -> tuple[int, ...]:
    """Sizes of a site's dimensions, and of the plates around it."""
    return (*site["fn"].shape(), *(frame.size for frame in site["cond_indep_stack"]))


@contextmanager
def _buffers_kept(model: Any) -> Iterator[None]:
    """Running statistics as they were before."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    values = [value.clone() for value in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, values, strict=True):
            buffer.copy_(value)


def _lift(model: object) -> str:
    if not isinstance(model, nn.Module):
        return ""
    return "\n  Try BayesianNetwork(net, likelihood, num_data), if this is a network."
