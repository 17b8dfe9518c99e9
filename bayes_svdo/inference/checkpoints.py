"""Posteriors on disk: safetensors for tensors, JSON for the rest, no pickle.

A saved posterior is a folder with ``posterior.json`` and the file of tensors that it names, whose
own name starts with its SHA-256. The JSON is put in place last, in one step: whatever happens
before that, the folder holds the posterior it held.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.poutine.indep_messenger import CondIndepStackFrame
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from bayes_svdo.distributions import EmpiricalBayes, LogUniform
from bayes_svdo.inference.arguments import check_count, check_threshold
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.history import History
from bayes_svdo.inference.posterior import Posterior, named_apart
from bayes_svdo.models import BayesianNetwork, Bernoulli, Categorical, Gaussian, Likelihood, build

FORMAT = 1
_JSON = "posterior.json"
_TENSORS = re.compile(r"posterior-[0-9a-f]{16}\.safetensors")


class CheckpointError(ValueError):
    """A saved posterior is missing, damaged, or does not fit the network."""


def save_posterior(posterior: Posterior, path: str | os.PathLike[str]) -> Path:
    """Write a posterior to the folder ``path``, replacing a posterior that is there.

    Of a Pyro model written by hand, the guide is saved, and the parameters if it is a module. A
    network whose prior is neither ``LogUniform`` nor ``EmpiricalBayes``, or whose likelihood is of
    a class of your own, is saved without it: :func:`load_posterior` then needs the ``model``.

    Raises:
        FileExistsError: ``path`` exists and is neither a saved posterior nor an empty folder.
    """
    target = Path(path)
    if target.exists() and not (target / _JSON).exists() and not _is_empty_folder(target):
        raise FileExistsError(f"{target} exists and is not a saved posterior.")
    packed = save_tensors(_tensors(posterior))
    digest = hashlib.sha256(packed).hexdigest()
    tensors = f"posterior-{digest[:16]}.safetensors"
    description = {"format": FORMAT, "tensors": tensors, "sha256": digest, **_describe(posterior)}
    text = json.dumps(description, indent=1, allow_nan=False)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / tensors, packed)
    _write(target / _JSON, text.encode())
    for file in target.iterdir():
        if _TENSORS.fullmatch(file.name) and file.name != tensors:
            file.unlink()
    return target


def load_posterior(
    path: str | os.PathLike[str],
    net: nn.Module | None = None,
    model: Callable[..., Any] | None = None,
) -> Posterior:
    """Read a posterior from the folder ``path``.

    Args:
        path: Where :meth:`~bayes_svdo.inference.Posterior.save` wrote it.
        net: The network, as it was given to ``BayesianNetwork``; its weights do not matter. Not
            needed for networks of :mod:`bayes_svdo.models`.
        model: The Pyro model, if it was written by hand (that its sites have the shapes that were
            saved is checked when it runs), or the ``BayesianNetwork`` as it was given
            to ``fit``: needed if its prior or likelihood is not one of ours. A module is copied.

    Returns:
        The posterior, on the CPU.

    Raises:
        CheckpointError: Nothing is there, it is damaged, or it does not fit ``net`` or ``model``.
        TypeError: ``net`` is not a module, or ``model`` a class.
    """
    given: object = net
    if given is not None and not isinstance(given, nn.Module):
        raise TypeError(f"net must be a torch.nn.Module, but is {_called(given)}")
    if isinstance(model, type):
        raise TypeError(f"model must be a Pyro model, but is {_called(model)}")
    folder = Path(path)
    description, tensors = _read(folder)
    try:
        # A network of ours starts at random, and is about to be overwritten.
        with torch.random.fork_rng(devices=[]):
            return _rebuild(description, tensors, net, model, folder)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / _JSON} is damaged: {error!r}.") from error


def _called(given: object) -> str:
    if isinstance(given, type):
        return f"the class {given.__name__}.\n  Try {given.__name__}(...), an instance of it."
    return f"{given!r}."


def _rebuild(
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    net: nn.Module | None,
    model: Callable[..., Any] | None,
    folder: Path,
) -> Posterior:
    with _damage(folder, "threshold"):
        threshold = check_threshold(_from_json(description["threshold"]))
    if "model" not in description and isinstance(model, BayesianNetwork):
        _check_network(description, net, model, folder)
        model = deepcopy(model)
        guide = _make_guide(description, model, folder)
    elif "model" in description:
        if net is not None or not callable(model) or isinstance(model, BayesianNetwork):
            raise CheckpointError(
                f"{folder} holds the posterior of {description['model']}, a Pyro model written by "
                "hand.\n  Try Posterior.load(path, model=...), without a net."
            )
        model = deepcopy(model)
        guide = _restore_guide(description, tensors, model, folder)
    elif model is not None:
        raise CheckpointError(
            f"{folder} holds a network, not a Pyro model written by hand.\n"
            "  Try Posterior.load(path, net=...), or a BayesianNetwork for a model."
        )
    else:
        model = _make_network(description, net, folder)
        guide = _make_guide(description, model, folder)
    for prefix, module in (("model.", model), ("guide.", guide)):
        if isinstance(module, nn.Module):
            _restore(module, prefix, tensors, folder)
    if isinstance(model, BayesianNetwork):
        model.start_from(guide.median())
    named_apart(model, guide)
    return Posterior(
        model.eval() if isinstance(model, nn.Module) else model,
        guide,
        history=History([_map_numbers(_from_json, row) for row in description["history"]]),
        threshold=threshold,
        stopped_because=description["stopped_because"],
        drawn=description.get("drawn", ()),
    )


@contextmanager
def _damage(folder: Path, entry: str) -> Iterator[None]:
    """Name the file, and the entry of it, that an error comes from."""
    try:
        yield
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f'{folder / _JSON} is damaged, at "{entry}": {error}') from error


def _make_guide(
    description: dict[str, Any], model: Callable[..., Any], folder: Path
) -> AdditiveNoiseGuide:
    with _damage(folder, "guide"):
        return AdditiveNoiseGuide(model, **description["guide"])


def _check_network(
    description: dict[str, Any], net: nn.Module | None, model: BayesianNetwork, folder: Path
) -> None:
    """Refuse a network that is given, but is not the one that was saved."""
    if net is not None:
        raise CheckpointError("both net and model are given.\n  Try the model alone.")
    described = _describe_network(model)
    for part, what in (
        ("sites", "sites"),
        ("num_data", "num_data"),
        ("prior", "a prior"),
        ("likelihood", "a likelihood"),
    ):
        if described[part] != description[part]:
            raise CheckpointError(
                f"{folder} has {what} {_shown(description[part])}, but model has "
                f"{_shown(described[part])}."
            )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        name = value.get("name", value.get("class"))
        rest = [f"{k}={v}" for k, v in value.items() if k not in ("name", "class")]
        return f"{name}({', '.join(rest)})"
    return ", ".join(value) if isinstance(value, list) else str(value)


def _make_network(
    description: dict[str, Any], net: nn.Module | None, folder: Path
) -> BayesianNetwork:
    for part in ("prior", "likelihood"):
        if "class" in description[part]:
            raise CheckpointError(
                f"{folder} holds a network whose {part} is a {description[part]['class']}, which "
                "cannot be saved.\n  Try Posterior.load(path, model=...), with the "
                "BayesianNetwork as it was given to fit."
            )
    if net is None:
        if description["network"] is None:
            raise CheckpointError(
                f"{folder} holds a network of your own class.\n  Try Posterior.load(path, net=...)."
            )
        with _damage(folder, "network"):
            net = build(**description["network"])
    with _damage(folder, "num_data"):
        num_data = check_count("num_data", description["num_data"])
    sites = set(description["sites"])
    missing = sites - {name for name, _ in net.named_parameters()}
    if missing:
        raise CheckpointError(
            f"{folder} has weights that net does not: {', '.join(sorted(missing))}."
        )
    return BayesianNetwork(
        net,
        _make_likelihood(description["likelihood"]),
        num_data,
        _make_prior(description["prior"]),
        where=lambda name, _: name in sites,
    )


def _restore_guide(
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    model: Callable[..., Any],
    folder: Path,
) -> AdditiveNoiseGuide:
    """A guide with the sites that were saved: its model is not run, which would take data."""
    guide = _make_guide(description, model, folder)
    trace: Any = poutine.Trace()
    frames: dict[str, CondIndepStackFrame] = {}
    for name, site in description["sites"].items():
        event_dim, shape = site["event_dim"], list(tensors[f"guide.keep.{name}"].shape)
        stack = tuple(CondIndepStackFrame(**plate, counter=0) for plate in site["plates"])
        for frame in stack:  # a prototype has seen a part of a plate that is subsampled
            shape[frame.dim - event_dim] = frame.size
        frames |= {frame.name: frame for frame in stack}
        prior: Any = LogUniform() if site.get("prunable", True) else Normal(0.0, 1.0)
        trace.add_node(
            name,
            name=name,
            type="sample",
            fn=prior.expand(shape).to_event(event_dim),
            value=torch.zeros(shape),
            is_observed=False,
            cond_indep_stack=stack,
            infer={},
        )
    guide.prototype_trace, guide._prototype_frames = trace, frames
    guide._setup_parameters()
    return guide


def _restore(module: nn.Module, prefix: str, tensors: dict[str, Tensor], folder: Path) -> None:
    state = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
    if len(dtypes) == 1:  # float64 posteriors come back as such
        module.to("cpu", dtypes.pop())
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit the network: {error}") from None


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / _JSON).is_file():
        raise CheckpointError(f"{folder} is not a saved posterior: it has no {_JSON}.")
    try:
        description = json.loads((folder / _JSON).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder / _JSON} is damaged: {error}") from None
    if not isinstance(description, dict) or "format" not in description:
        raise CheckpointError(f"{folder / _JSON} does not describe a posterior.")
    if description["format"] != FORMAT:
        raise CheckpointError(
            f"{folder} has format {description['format']}; this version reads {FORMAT}."
        )
    name = str(description.get("tensors"))
    if not _TENSORS.fullmatch(name) or not (folder / name).is_file():
        raise CheckpointError(f"{folder} is damaged: it has no file {name} of tensors.")
    packed = (folder / name).read_bytes()
    if hashlib.sha256(packed).hexdigest() != description.get("sha256"):
        raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the recorded one.")
    return description, load_tensors(packed)


def _write(path: Path, content: bytes) -> None:
    """Write a file in full or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _tensors(posterior: Posterior) -> dict[str, Tensor]:
    """State of model and guide, each tensor with memory of its own, as safetensors wants it."""
    return {
        prefix + name: value.detach().cpu().clone().contiguous()
        for prefix, module in (("model.", posterior.model), ("guide.", posterior.guide))
        if isinstance(module, nn.Module)
        for name, value in module.state_dict().items()
    }


def _describe(posterior: Posterior) -> dict[str, Any]:
    model, guide = posterior.model, posterior.guide
    if isinstance(model, BayesianNetwork):
        described = {"network": _spec(model.net), **_describe_network(model)}
    else:
        described = {
            "model": getattr(model, "__name__", type(model).__name__),
            "sites": {name: _describe_site(guide, name) for name in guide.sites},
        }
    return described | {
        "guide": {
            "init_log_sigma2": guide.init_log_sigma2,
            "sigma": guide.sigma,
        },
        "threshold": _to_json(posterior.threshold),
        "stopped_because": posterior.stopped_because,
        "drawn": sorted(posterior.drawn),
        "history": [_map_numbers(_to_json, row) for row in posterior.history],
    }


def _describe_network(model: BayesianNetwork) -> dict[str, Any]:
    return {
        "sites": list(model.sites),
        "num_data": model.num_data,
        "prior": _describe_prior(model.prior),
        "likelihood": _describe_likelihood(model.likelihood),
    }


def _spec(net: nn.Module) -> dict[str, Any] | None:
    """What builds the network again; None if it has been changed since it was built."""
    spec: Any = getattr(net, "spec", None)
    if not isinstance(spec, dict):
        return None
    try:
        with torch.device("meta"):
            built = build(**spec)
    except (TypeError, ValueError):  # an attribute of the user's own
        return None
    return spec if repr(built) == repr(net) else None


def _describe_site(guide: AdditiveNoiseGuide, name: str) -> dict[str, Any]:
    frames = guide.prototype_trace.nodes[name]["cond_indep_stack"]
    return {
        "event_dim": guide._event_dims[name],
        "prunable": name in guide.prunable_sites,
        "plates": [
            {"name": f.name, "dim": f.dim, "size": f.size, "full_size": f.full_size} for f in frames
        ],
    }


def _to_json(value: float) -> float | str:
    """JSON knows no infinity: it becomes a string."""
    return value if math.isfinite(value) else str(float(value))


def _from_json(value: float | str) -> float:
    return float(value) if isinstance(value, str) else value


def _map_numbers(function: Any, row: dict[str, Any]) -> dict[str, Any]:
    return {name: function(value) for name, value in row.items()}


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _describe_prior(prior: Any) -> dict[str, Any]:
    """By name if it can be made again; else its class alone. A subclass has a KL of its own."""
    if type(prior) is LogUniform:
        return {"name": "LogUniform", "kl": prior.kl, "extrapolate": prior.extrapolate}
    if type(prior) is EmpiricalBayes:
        return {"name": "EmpiricalBayes"}
    return {"class": type(prior).__name__}


def _make_prior(description: dict[str, Any]) -> LogUniform | EmpiricalBayes:
    if description["name"] == "EmpiricalBayes":
        return EmpiricalBayes()
    return LogUniform(description["kl"], extrapolate=description["extrapolate"])


def _describe_likelihood(likelihood: Likelihood) -> dict[str, Any]:
    if type(likelihood) is Gaussian:
        return {"name": "Gaussian", "noise": likelihood.noise}  # the scale is in the tensors
    if type(likelihood) in (Categorical, Bernoulli):
        return {"name": type(likelihood).__name__}
    return {"class": type(likelihood).__name__}


def _make_likelihood(description: dict[str, Any]) -> Likelihood:
    if description["name"] == "Gaussian":
        return Gaussian(noise=description["noise"])
    return {"Categorical": Categorical, "Bernoulli": Bernoulli}[description["name"]]()
