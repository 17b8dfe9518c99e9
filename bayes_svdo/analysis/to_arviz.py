"""A fitted posterior as ArviZ takes it: draws of the weights, what they predict, and how well.

``InferenceData`` of ArviZ 0.2x or ``DataTree`` of ArviZ 1.x, of one chain, by ArviZ's schema:

- ``posterior``: draws of the weights, a variable for each site, named as the site (with ``.`` for
  ``/``, which netCDF takes for a group). Biases and other point estimates have no draws and are in
  no group.
- ``posterior_predictive``: for each draw of the weights, a draw of ``y``.
- ``log_likelihood``: for each draw of the weights, ``log p(y_n | x_n, weights)`` of every data
  point, in nats.
- ``observed_data``: ``y``. Dimensions of size 1 at its end, as of ``(N, 1)``, are dropped here and
  in ``posterior_predictive``: ``az.loo_pit`` takes no others.
- ``constant_data``: ``x``, and of every site ``<site>.log_alpha``, ``<site>.snr`` (``|loc| /
  sigma``) and ``<site>.kept``. These are numbers about ``q``, one for each weight, not for each
  draw: ``sample_stats`` must have dimensions ``chain`` and ``draw``, ``constant_data`` need not.

One set of draws serves all groups. With ``surviving_only`` a site has one dimension,
``<site>_weight``, over the weights that are kept, labelled by unit and input, with both as
coordinates of their own in ``constant_data`` (``<site>_unit``, ``<site>_input``: netCDF has no
MultiIndex, and ``az.summary`` of 1.x takes no other coordinates in ``posterior``). Otherwise it has
the dimensions of the weight, ``<site>_unit`` and ``<site>_input``. A scalar has none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray

from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.draws import Drawn, DrawnData, Predictions, SiteDraws
from bayes_svdo.analysis.figures import check_posterior
from bayes_svdo.distributions.scale_free import ScaleFreePrior
from bayes_svdo.inference.arguments import check_count, check_seed
from bayes_svdo.inference.posterior import Posterior
from bayes_svdo.inference.surroundings import random_state

if TYPE_CHECKING:
    import xarray as xr

_MAX_BYTES = 2 * 2**30
_HALF = (torch.float16, torch.bfloat16)
_APPROXIMATION = (
    "Draws are from q, a fitted Gaussian with independent weights (variational inference), not "
    "from MCMC."
)
_IMPROPER = (
    " The prior is improper, and so is the posterior under it: there is no exact posterior that q "
    "approximates. Check its uncertainty on data."
)


def import_arviz() -> Any:
    """ArviZ, without what 0.2x has to say on its first import of a day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        import arviz
    return arviz


@torch.no_grad()
def to_arviz(
    posterior: Posterior,
    x: Any = None,
    y: Any = None,
    draws: int = 1000,
    *,
    sites: str | Iterable[str] | None = None,
    surviving_only: bool = True,
    threshold: float | None = None,
    seed: int | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    batch_size: int = 1000,
    max_bytes: int = _MAX_BYTES,
) -> Any:
    """Draws from a posterior, and what they predict, for ArviZ. Groups: see the module.

    Draws are independent, so ESS is near ``draws`` and R-hat has nothing to compare: neither says
    how good ``q`` is. ``az.loo`` takes the draws for exact; its Pareto k tells of influential data
    points, not of errors of ``q``.

    A point whose likelihood is the same in every draw (all units off) has no tail to fit: its ``k``
    is inf in ArviZ 0.2x, and ``az.loo`` of 1.x raises. Leave such points out of ``x``.

    Args:
        posterior: Of any model; with ``x``, of a :class:`~bayes_svdo.models.BayesianNetwork`.
        x: Inputs of shape ``(N, ...)``, or a tuple of such; None for the weights alone.
        y: Targets of shape ``(N, ...)``, for the likelihood.
        draws: Number of draws of all weights.
        sites: Names of the sites to export; all if None. Predictions always use all.
        surviving_only: Whether weights that are pruned at ``threshold`` are zero in every draw, for
            predictions too, and left out. If not, nothing is pruned that was not while training.
        threshold: The posterior's own if None.
        seed: For the draws; torch's global generators are left as they were. None to go on with
            those. Weights are the same with and without ``x``.
        coords: Labels by name of dimension: ``"<site>_unit"``, ``"<site>_input"``, ``"data"``.
            Those of sites that are not exported are not used.
        batch_size: Inputs taken at a time.
        max_bytes: Most memory that the result may take. What is needed besides is for one draw of
            the weights, its outputs and one batch.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.2x) or ``xarray.DataTree`` (1.x). Draws are in float32, the
        log likelihood in float64, data of 16 bits in float32.

    Raises:
        TypeError: ``x`` is given and the model is no ``BayesianNetwork``, or ``x`` or ``y`` is of
            the wrong type.
        ValueError: An argument is out of range, ``sites`` or ``coords`` names what is not there, no
            weight is left, names of sites differ in ``/`` and ``.`` alone, ``y`` does not go with
            ``x``, or the network's output is not finite.
        MemoryError: The result would take more than ``max_bytes``. Nothing was drawn yet.
    """
    check_posterior(posterior, "to_arviz")
    draws = check_count("draws", draws)
    batch_size = check_count("batch_size", batch_size)
    max_bytes = check_count("max_bytes", max_bytes)
    seed = check_seed(seed)
    if y is not None and x is None:
        raise ValueError("y was given without x, the inputs that it goes with.")
    threshold = posterior._threshold(threshold)
    chosen = _chosen(sites, posterior.guide.sites)
    weights = SiteDraws.of(posterior, threshold, surviving_only)
    exported = [site for site in weights if site.name in chosen and len(site)]
    if not exported:
        raise _none_left(posterior, chosen, threshold)
    _check_names(weights)
    data = None if x is None else DrawnData.of(posterior, weights, x, y, "to_arviz")
    labels = _Labels.of(coords, weights, data)
    _check_size(exported, data, draws, max_bytes, surviving_only)

    with random_state(seed, posterior.device):
        drawn = {site.name: site.draw_into_memory(draws) for site in exported}
        groups = {"posterior": _posterior_group(exported, drawn, labels, draws)}
        if data is not None:
            predictions = data.predict(weights, drawn, draws, batch_size)
            groups |= _data_groups(data, predictions, labels, draws)
    groups["constant_data"] = _constant_group(exported, data, labels)
    attributes = _attributes(posterior, weights, threshold, surviving_only, seed)
    return _assembled({name: group.assign_attrs(attributes) for name, group in groups.items()})


def _chosen(sites: str | Iterable[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    if sites is None:
        return known
    names = [sites] if isinstance(sites, str) else list(sites)
    for name in names:
        if name not in known:
            raise unknown_name("site", name, known)
    if not names:
        raise ValueError("sites is empty.")
    return tuple(name for name in known if name in names)


def _none_left(posterior: Posterior, chosen: Sequence[str], threshold: float) -> ValueError:
    names, log_alpha = ", ".join(chosen), posterior.log_alpha()
    if all(bool(log_alpha[name].isposinf().all()) for name in chosen):
        return ValueError(
            f"no weight of {names} is left at any threshold: all were pruned while training.\n"
            "  Try surviving_only=False, for weights of zero in every draw."
        )
    return ValueError(
        f"no weight of {names} is left at threshold {threshold:g}.\n"
        "  Try surviving_only=False, or a higher threshold."
    )


def _check_names(sites: Sequence[SiteDraws]) -> None:
    names: dict[str, str] = {}
    for site in sites:
        other = names.setdefault(_variable(site), site.name)
        if other != site.name:
            raise ValueError(
                f'sites "{other}" and "{site.name}" would both be "{_variable(site)}": "/" is a '
                "group in netCDF, and becomes a dot.\n  Try another name for one of them."
            )


def _variable(site: SiteDraws) -> str:
    return site.name.replace("/", ".")


class _Labels(dict[str, NDArray[Any]]):
    """Labels along every dimension, by its name."""

    @staticmethod
    def of(
        given: Mapping[str, Sequence[Any]] | None,
        sites: Sequence[SiteDraws],
        data: DrawnData | None,
    ) -> _Labels:
        sizes = {
            f"{_variable(site)}_{axis}": size
            for site in sites
            for axis, size in zip(site.axes, site.shape, strict=True)
        }
        if data is not None:
            sizes |= dict(zip(_dims("y", data.y_shape), (len(data), *data.y_shape), strict=True))
            for name, value in _named_inputs(data):
                sizes |= dict(zip(_dims(name, value.shape[1:]), value.shape, strict=True))
        labels = _Labels({dim: np.arange(size) for dim, size in sizes.items()})
        for dim, values in (given or {}).items():
            if dim not in sizes:
                raise unknown_name("dimension in coords", dim, sizes)
            if len(values) != sizes[dim]:
                raise ValueError(
                    f'coords["{dim}"] must hold {sizes[dim]} labels, but holds {len(values)}.'
                )
            if len(set(values)) < len(values):
                raise ValueError(f'coords["{dim}"] must hold labels that differ.')
            labels[dim] = np.asarray(values)
        return labels

    def along(self, site: SiteDraws) -> dict[str, Any]:
        """Coordinates of a site's own dimensions."""
        if site.index is None:
            return {dim: self[dim] for dim in _site_dims(site)}
        # An axis of one, as the single unit of a regression, says nothing.
        told = [
            part
            for (_, part), size in zip(self.parts(site).values(), site.shape, strict=True)
            if size > 1
        ] or [part for _, part in self.parts(site).values()][-1:]
        shown = [", ".join(map(str, each)) for each in zip(*told, strict=True)] or [_variable(site)]
        return {_site_dims(site)[0]: shown}

    def parts(self, site: SiteDraws) -> dict[str, tuple[str, NDArray[Any]]]:
        """Where each surviving weight is: a coordinate for every axis."""
        if site.index is None:
            return {}
        places = np.unravel_index(site.index.cpu().numpy(), site.shape)
        names = [f"{_variable(site)}_{axis}" for axis in site.axes]
        return {
            name: (_site_dims(site)[0], self[name][place])
            for name, place in zip(names, places, strict=True)
        }


def _site_dims(site: SiteDraws) -> tuple[str, ...]:
    axes = site.axes if site.index is None else ("weight",)
    return tuple(f"{_variable(site)}_{axis}" for axis in axes)


def _site_shape(site: SiteDraws) -> tuple[int, ...]:
    return site.shape if site.index is None else (len(site),)


def _dims(name: str, shape: Sequence[int]) -> tuple[str, ...]:
    """Dimensions of data of which one point has ``shape``."""
    return ("data", *(f"{name}_dim_{index}" for index in range(1, 1 + len(shape))))


def _named_inputs(data: DrawnData) -> list[tuple[str, torch.Tensor]]:
    if len(data.x) == 1:
        return [("x", data.x[0])]
    return [(f"x_{index}", value) for index, value in enumerate(data.x)]


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` without dimensions of size 1 at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _numpy(value: torch.Tensor) -> NDArray[Any]:
    """In float32 where it has 16 bits: NumPy knows no bfloat16, and netCDF neither."""
    array: NDArray[Any] = (value.float() if value.dtype in _HALF else value).cpu().numpy()
    return array


# Groups.


def _posterior_group(
    sites: Sequence[SiteDraws], drawn: Drawn, labels: _Labels, draws: int
) -> xr.Dataset:
    import xarray as xr

    variables = {
        _variable(site): (
            ("chain", "draw", *_site_dims(site)),
            drawn[site.name].reshape(1, draws, *_site_shape(site)),
        )
        for site in sites
    }
    coordinates: dict[str, Any] = {"chain": [0], "draw": np.arange(draws)}
    for site in sites:
        coordinates |= labels.along(site)
    return xr.Dataset(variables, coordinates)


def _data_groups(
    data: DrawnData, predictions: Predictions, labels: _Labels, draws: int
) -> dict[str, xr.Dataset]:
    import xarray as xr

    sample = {"chain": [0], "draw": np.arange(draws)}
    shape = (len(data), *_without_ones(data.y_shape))
    dims = _dims("y", shape[1:])
    coordinates = {dim: labels[dim] for dim in dims}
    variable = (("chain", "draw", *dims), predictions.y.reshape(1, draws, *shape))
    groups = {"posterior_predictive": xr.Dataset({"y": variable}, sample | coordinates)}
    if data.y is not None and predictions.log_likelihood is not None:
        of_y = {"y": (("chain", "draw", "data"), predictions.log_likelihood[None])}
        groups["log_likelihood"] = xr.Dataset(of_y, sample | {"data": labels["data"]})
        observed = _numpy(data.y).reshape(shape)
        observed = observed.astype(np.int32) if data.discrete else observed
        groups["observed_data"] = xr.Dataset({"y": (dims, observed)}, coordinates)
    return groups


def _constant_group(
    sites: Sequence[SiteDraws], data: DrawnData | None, labels: _Labels
) -> xr.Dataset:
    import xarray as xr

    variables: dict[str, Any] = {}
    coordinates: dict[str, Any] = {}
    for site in sites:
        about = {
            "log_alpha": (site.log_alpha.float(), "log sigma^2 - log loc^2"),
            "snr": ((-0.5 * site.log_alpha).exp().float(), "|loc| / sigma"),
            "kept": (site.kept, "not pruned at the threshold"),
        }
        for key, (values, meaning) in about.items():
            attributes = {"meaning": meaning, "shape_of_weight": str(site.shape)}
            array = values.cpu().numpy().reshape(_site_shape(site))
            variables[f"{_variable(site)}.{key}"] = (_site_dims(site), array, attributes)
        coordinates |= labels.along(site) | labels.parts(site)
    for name, value in [] if data is None else _named_inputs(data):
        dims = _dims(name, value.shape[1:])
        variables[name] = (dims, _numpy(value))
        coordinates |= {dim: labels[dim] for dim in dims}
    return xr.Dataset(variables, coordinates)


def _attributes(
    posterior: Posterior,
    sites: Sequence[SiteDraws],
    threshold: float,
    surviving_only: bool,
    seed: int | None,
) -> dict[str, Any]:
    """What netCDF can hold: numbers and text."""
    priors = [site["fn"] for _, site in posterior.guide.prototype_trace.iter_stochastic_nodes()]
    improper = any(isinstance(_base(prior), ScaleFreePrior) for prior in priors)
    attributes: dict[str, Any] = {
        "created_at": datetime.now(UTC).isoformat(),
        "arviz_version": version("arviz"),
        "inference_library": "bayes_svdo",
        "inference_library_version": version("bayes-svdo"),
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "approximation": _APPROXIMATION + (_IMPROPER if improper else ""),
        "threshold": threshold,
        "surviving_only": str(surviving_only),
    }
    if seed is not None:
        attributes["seed"] = seed
    empty = [site.name for site in sites if not len(site)]
    if empty:
        attributes["sites_without_weights"] = ", ".join(empty)
    return attributes


def _base(prior: Any) -> Any:
    while hasattr(prior, "base_dist"):
        prior = prior.base_dist
    return prior


def _assembled(groups: Mapping[str, xr.Dataset]) -> Any:
    az = import_arviz()
    if int(az.__version__.split(".")[0]) < 1:
        attributes = dict(groups["posterior"].attrs)
        return az.InferenceData(attrs=attributes, **groups)
    import xarray as xr

    root = xr.Dataset(attrs=groups["posterior"].attrs)
    return xr.DataTree.from_dict({"/": root, **groups})


# Memory.


def _check_size(
    sites: Sequence[SiteDraws],
    data: DrawnData | None,
    draws: int,
    max_bytes: int,
    surviving_only: bool,
) -> None:
    numbers = sum(len(site) for site in sites)
    per_draw = 4 * numbers
    fixed = sum(len(site) * 9 for site in sites)
    if surviving_only:  # text of a label, and an integer for each axis
        fixed += sum(
            len(site) * (4 * (len(str(site.shape)) + 2) + 8 * len(site.shape)) for site in sites
        )
    if data is not None:
        of_y = len(data) * int(np.prod(data.y_shape))
        per_draw += 4 * of_y
        fixed += sum(value.numel() * _numpy(value[:0]).itemsize for value in data.x)
        if data.y is not None:
            per_draw += 8 * len(data)
            fixed += data.y.numel() * data.y.element_size()
    needed = draws * per_draw + fixed
    if needed <= max_bytes:
        return
    remedies = []
    fitting = (max_bytes - fixed) // per_draw
    if fitting >= 1:
        remedies.append(f"draws={fitting}")
    if len(sites) > 1:
        remedies.append(f'sites=["{min(sites, key=len).name}"]')
    if not surviving_only:
        remedies.append("surviving_only=True")
    if data is not None:
        remedies.append("fewer data points")
    remedies.append("a larger max_bytes")
    raise MemoryError(
        f"{draws} draws of {numbers:,} weights"
        + ("" if data is None else f" and their predictions for {len(data):,} data points")
        + f" would take {_gigabytes(needed)}, more than max_bytes = {_gigabytes(max_bytes)}.\n"
        f"  Try {', '.join(remedies[:-1])}{' or ' if len(remedies) > 1 else ''}{remedies[-1]}."
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
