"""Which sites of a model written by hand are of its data points, and what is refused of them.

Nothing in a Pyro model says what its data are. So it is run on a batch and on the batch less one
point: what has fewer rows then, or is not there, is of the data points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.surroundings import random_numbers_kept

Site = dict[str, Any]


@torch.no_grad()
def check_sites(model: Any, guide: AdditiveNoiseGuide, batch: tuple[Any, ...]) -> None:
    """Refuse a batch that a model cannot be run on.

    Raises:
        ValueError: An observed value is not of the shape of its distribution. Whatever else the
            model raises goes through.
    """
    with _left_as_it_was(model, guide):
        _sites(model, guide(*batch), batch)


@torch.no_grad()
def check_scale(
    model: Any, guide: AdditiveNoiseGuide, batch: tuple[Any, ...], num_data: int | None
) -> None:
    """Refuse a model that takes a batch for something else than it is.

    One that observes nothing has no data to be fitted to. Variables of its own for each data point
    would be fitted to others, for ``fit`` shuffles. And where a batch of ``M`` points does not
    count as all ``num_data``, the KL is too strong or too weak.

    Raises:
        ValueError: Names the site.
    """
    with _left_as_it_was(model, guide):
        sites, of_data = _sites_of_data(model, guide(*batch), batch)
    latent = {name: site for name, site in sites.items() if not site["is_observed"]}
    if set(latent) != set(guide.sites):
        raise ValueError(
            f"guide is for the sites {', '.join(guide.sites)}, but the model has "
            f"{', '.join(latent) or 'none'}."
        )
    for name, site in latent.items():
        if name not in of_data:
            guide.check_shape(site)
    if len(latent) == len(sites):
        raise ValueError(
            f"the model observes nothing: it has the latent sites {', '.join(sites)} alone, which "
            "would be fitted to no data.\n  Try obs=y in the pyro.sample statement of the data."
        )
    if guide.create_plates is None:  # else it says which rows of the guide a batch is of
        for name in latent:
            if name in of_data:
                raise _of_each_point(name, latent[name])
    if num_data is not None:
        for name in of_data:
            if name not in latent:
                _check_scale_of(name, sites[name], len(batch[-1]), num_data)


def _of_each_point(name: str, site: Site) -> ValueError:
    plates = [frame.name for frame in site["cond_indep_stack"] if frame.vectorized]
    what = f'plate "{plates[-1]}" gives every data point' if plates else "every data point has"
    return ValueError(
        f'at site "{name}", {what} a variable of its own, but fit shuffles the data: each would be '
        "fitted to other points.\n"
        "  Try obs=y, if it is the data; else pyro.infer.SVI with TraceAnalyticKL_ELBO and the "
        "data in their order, or a model with this variable integrated out."
    )


def _check_scale_of(name: str, site: Site, size: int, num_data: int) -> None:
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
    model: Any, weights: dict[str, Tensor], batch: tuple[Any, ...]
) -> tuple[dict[str, Site], list[str]]:
    """The model's sites for a batch, and the names of those that are of its data points.

    A site or plate of something else, of outputs say, may be as long as the batch by chance.
    """
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


def _sites(model: Any, weights: dict[str, Tensor], batch: tuple[Any, ...]) -> dict[str, Site]:
    """The sample sites for a batch, at these weights, with zeros for what has another shape.

    Raises:
        ValueError: An observed value is not of the shape of its distribution.
    """
    any_of_them = next(iter(weights.values()))

    def value_of(site: Site) -> Tensor:
        shape = site["fn"].shape()
        own = weights.get(site["name"], any_of_them)
        return own if own.shape == shape else own.new_zeros(shape)

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


def _sizes(site: Site) -> tuple[int, ...]:
    """Sizes of a site's dimensions, and of the plates around it."""
    return (*site["fn"].shape(), *(frame.size for frame in site["cond_indep_stack"]))


@contextmanager
def _left_as_it_was(model: Any, guide: AdditiveNoiseGuide) -> Iterator[None]:
    """Random numbers and running statistics as they were before."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    values = [value.clone() for value in buffers]
    with random_numbers_kept(guide.location_parameters()[0].device):
        try:
            yield
        finally:
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)
