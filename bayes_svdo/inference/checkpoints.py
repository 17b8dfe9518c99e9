"""Posteriors on disk: safetensors for tensors, JSON for the rest, no pickle.

A saved posterior is a folder with ``posterior.json`` and ``posterior.safetensors``. It is written
beside its place and moved there whole; the JSON carries the SHA-256 of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from bayes_svdo.distributions import EmpiricalBayes, LogUniform
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.history import History
from bayes_svdo.inference.posterior import Posterior
from bayes_svdo.models import BayesianNetwork, Bernoulli, Categorical, Gaussian, Likelihood, build

FORMAT = 1
_JSON, _TENSORS = "posterior.json", "posterior.safetensors"


class CheckpointError(ValueError):
    """A saved posterior is missing, damaged, or does not fit the network."""


def save_posterior(posterior: Posterior, path: str | os.PathLike[str]) -> Path:
    """Write a posterior to the folder ``path``, replacing a posterior that is there.

    Raises:
        TypeError: The model is not a :class:`~bayes_svdo.models.BayesianNetwork`, or its prior or
            likelihood is of a class of your own.
        FileExistsError: ``path`` exists and is not a saved posterior.
    """
    target = Path(path)
    if target.exists() and not (target / _JSON).exists() and not _is_empty_folder(target):
        raise FileExistsError(f"{target} exists and is not a saved posterior.")
    network = posterior._network()
    tensors = _tensors(posterior)
    packed = save_tensors(tensors)
    description = {
        "format": FORMAT,
        "sha256": hashlib.sha256(packed).hexdigest(),
        "network": getattr(network.net, "spec", None),
        "sites": list(network.sites),
        "num_data": network.num_data,
        "prior": _describe_prior(network.prior),
        "likelihood": _describe_likelihood(network.likelihood),
        "guide": {
            "init_log_sigma2": posterior.guide.init_log_sigma2,
            "sigma": posterior.guide.sigma,
        },
        "threshold": posterior.threshold,
        "stopped_because": posterior.stopped_because,
        "history": list(posterior.history),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        (temporary / _TENSORS).write_bytes(packed)
        (temporary / _JSON).write_text(json.dumps(description, indent=1))
        temporary.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def load_posterior(path: str | os.PathLike[str], net: nn.Module | None = None) -> Posterior:
    """Read a posterior from the folder ``path``.

    Args:
        path: Where :meth:`~bayes_svdo.inference.Posterior.save` wrote it.
        net: The network, as it was given to ``BayesianNetwork``; its weights do not matter. Not
            needed for networks that :func:`bayes_svdo.models.build` made.

    Raises:
        CheckpointError: Nothing is there, it is damaged, or it does not fit ``net``.
    """
    folder = Path(path)
    description, tensors = _read(folder)
    if net is None:
        if description["network"] is None:
            raise CheckpointError(
                f"{folder} holds a network of your own class.\n  Try Posterior.load(path, net=...)."
            )
        net = build(**description["network"])
    missing = set(description["sites"]) - {name for name, _ in net.named_parameters()}
    if missing:
        raise CheckpointError(
            f"{folder} has weights that net does not: {', '.join(sorted(missing))}."
        )
    # Likewise drawn at random, and about to be replaced.
    model = BayesianNetwork(
        net,
        _make_likelihood(description["likelihood"]),
        description["num_data"],
        _make_prior(description["prior"]),
        where=list(description["sites"]),
    )
    guide = AdditiveNoiseGuide(model, **description["guide"])
    for prefix, module in (("model.", model), ("guide.", guide)):
        state = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        # float64 posteriors come back as such.
        dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
        if dtypes == {torch.float64}:
            module.double()
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{folder} does not fit the network: {error}") from None
    return Posterior(
        model.eval(),
        guide,
        history=History(description["history"]),
        threshold=description["threshold"],
        stopped_because=description["stopped_because"],
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (_JSON, _TENSORS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} is not a saved posterior: it has no {name}.")
    try:
        description: dict[str, Any] = json.loads((folder / _JSON).read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / _JSON} is damaged: {error}") from None
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {description.get('format')}; this version reads {FORMAT}."
        )
    packed = (folder / _TENSORS).read_bytes()
    if hashlib.sha256(packed).hexdigest() != description["sha256"]:
        raise CheckpointError(
            f"{folder / _TENSORS} is damaged: its SHA-256 is not the recorded one."
        )
    return description, load_tensors(packed)


def _tensors(posterior: Posterior) -> dict[str, Tensor]:
    """State of model and guide, each tensor with memory of its own, as safetensors wants it."""
    network = posterior._network()
    return {
        prefix + name: value.detach().cpu().clone().contiguous()
        for prefix, module in (("model.", network), ("guide.", posterior.guide))
        for name, value in module.state_dict().items()
    }


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _describe_prior(prior: Any) -> dict[str, Any]:
    if isinstance(prior, LogUniform):
        return {"name": "LogUniform", "kl": prior.kl, "extrapolate": prior.extrapolate}
    if isinstance(prior, EmpiricalBayes):
        return {"name": "EmpiricalBayes"}
    raise TypeError(
        f"only LogUniform and EmpiricalBayes priors can be saved, but the prior is {prior}."
    )


def _make_prior(description: dict[str, Any]) -> LogUniform | EmpiricalBayes:
    if description["name"] == "EmpiricalBayes":
        return EmpiricalBayes()
    return LogUniform(description["kl"], extrapolate=description["extrapolate"])


def _describe_likelihood(likelihood: Likelihood) -> dict[str, Any]:
    if type(likelihood) is Gaussian:
        return {"name": "Gaussian", "noise": likelihood.noise}  # the scale is in the tensors
    if type(likelihood) in (Categorical, Bernoulli):
        return {"name": type(likelihood).__name__}
    raise TypeError(
        "only Categorical, Bernoulli and Gaussian likelihoods can be saved, not "
        f"{type(likelihood).__name__}."
    )


def _make_likelihood(description: dict[str, Any]) -> Likelihood:
    if description["name"] == "Gaussian":
        return Gaussian(noise=description["noise"])
    return {"Categorical": Categorical, "Bernoulli": Bernoulli}[description["name"]]()
