"""The fitted posterior, and everything a user asks of it."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_svdo.inference.arguments import (
    check_count,
    check_seed,
    check_threshold,
    choose_device,
)
from bayes_svdo.inference.draws import outputs_at_draws
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.history import History
from bayes_svdo.inference.inputs import inputs_of
from bayes_svdo.inference.surroundings import random_state
from bayes_svdo.models import BayesianNetwork
from bayes_svdo.models.bayesian_network import OutputError

if TYPE_CHECKING:
    import os

    from bayes_svdo.analysis.predictives import ClassificationPredictive, RegressionPredictive
    from bayes_svdo.analysis.sparsity import SparsityTable
    from bayes_svdo.analysis.uncertainty import Method

_PREDICTION_BATCH = 1000


_numbers = itertools.count(1)


def named_apart(*modules: Any) -> None:
    """Give Pyro modules names of their own.

    Pyro's parameter store goes by names, and writes what it has of a name into every module that
    comes with it: two posteriors under one name would become one.
    """
    number = next(_numbers)
    for module in modules:
        if not isinstance(module, PyroModule) or _names_its_sites(module):
            continue
        context = type(module._pyro_context)()
        for path, part in module.named_modules(prefix=f"{type(module).__name__}_{number}"):
            if isinstance(part, PyroModule):
                part._pyro_name, part._pyro_context = path, context


def _names_its_sites(module: nn.Module) -> bool:
    """Whether names of sites follow the module's: a ``PyroSample`` is one, and has a guide."""
    return any(part._pyro_samples for part in module.modules() if isinstance(part, PyroModule))


class Posterior:
    """A model and its fitted guide.

    Attributes:
        model: The Pyro model (point estimates included), a copy of the one given to ``fit``.
        guide: The fitted guide.
        history: One row per epoch.
        threshold: A weight is pruned where ``log alpha >= threshold``, unless another is given.
        stopped_because: Why training ended, in words.
        drawn: Sites whose weights ``predictive(..., method="local")`` draws, as the objective did;
            others are left to local reparameterization.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AdditiveNoiseGuide,
        *,
        history: History | None = None,
        threshold: float = 3.0,
        stopped_because: str = "",
        drawn: Collection[str] = (),
    ) -> None:
        self.model = model
        self.guide = guide
        self.history = History() if history is None else history
        self.threshold = check_threshold(threshold)
        self.stopped_because = stopped_because
        self.drawn = frozenset(drawn)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        named_apart(self.model, self.guide)  # a copy, or one from a pickle

    def log_alpha(self) -> dict[str, Tensor]:
        """``log alpha = log sigma² - log loc²`` of every weight, by site; inf where pruned."""
        return self.guide.log_alpha()

    def sparsity(self, threshold: float | None = None) -> SparsityTable:
        """What pruning at ``threshold`` leaves, per layer and in all."""
        from bayes_svdo.analysis.sparsity import sparsity_table

        module = self.model.net if isinstance(self.model, BayesianNetwork) else self.model
        estimates = list(module.parameters()) if isinstance(module, nn.Module) else []
        return sparsity_table(
            self.log_alpha(),
            self._threshold(threshold),
            prunable=self.guide.prunable_sites,
            num_biases=sum(p.numel() for p in estimates if p.dim() < 2),
            num_dense=sum(p.numel() for p in estimates if p.dim() >= 2),
        )

    def means(self, threshold: float | None = None) -> dict[str, Tensor]:
        """Posterior mean of every weight, zero where pruned, by site.

        Only the guide's ``prunable_sites`` are pruned: those whose prior is scale-free.
        """
        pruned = self.guide.is_pruned(self._threshold(threshold))
        return {
            name: loc.masked_fill(pruned[name], 0.0) for name, loc in self.guide.median().items()
        }

    def prune(self, threshold: float | None = None) -> nn.Module:
        """The pruned network: a plain copy of the user's module, posterior means for weights.

        Weights with ``log alpha >= threshold`` are exact zeros. Tied weights stay tied. The module
        is in evaluation mode.

        Raises:
            TypeError: The model is not a :class:`~bayes_svdo.models.BayesianNetwork`.
        """
        net = deepcopy(self._network("prune").net)
        for name, mean in self.means(threshold).items():
            buffer = net.get_buffer(name)
            parameter = nn.Parameter(mean)
            for module in net.modules():
                for key, value in list(module._buffers.items()):
                    if value is buffer:
                        del module._buffers[key]
                        setattr(module, key, parameter)  # an RNN looks on
        return net.eval()

    @torch.no_grad()
    def output(
        self, x: Any, threshold: float | None = None, batch_size: int = _PREDICTION_BATCH
    ) -> Tensor:
        """Output (logits, means) of the pruned mean network, shape ``(N, ...)``."""
        self._network("output")
        return self._output(self.means(threshold), x, batch_size)

    @torch.no_grad()
    def _output(
        self, weights: dict[str, Tensor], x: Any, batch_size: int = _PREDICTION_BATCH
    ) -> Tensor:
        """The network's output for given weights, in evaluation mode."""
        network = self._network("output")
        inputs = inputs_of(x)
        with _evaluating(network), _explained(inputs, self.dtype):
            return torch.cat(
                [network.output(weights, batch) for batch in self._split(inputs, batch_size)]
            )

    @torch.no_grad()
    def predict(
        self,
        x: Any,
        num_samples: int | None = None,
        *,
        threshold: float | None = None,
        batch_size: int = _PREDICTION_BATCH,
        seed: int | None = None,
    ) -> Tensor:
        """Means of ``y`` given ``x``: class probabilities, or means of a regression.

        Args:
            x: Inputs of shape ``(N, ...)``, or a tuple of such; finite.
            num_samples: None for the pruned mean network. A number ``S`` for as many draws of all
                weights from the posterior: each is one function of all inputs.
            threshold: Where to prune. If None, the mean network is pruned at the posterior's own
                threshold, and draws are not pruned.
            batch_size: Inputs taken at a time, of all draws together, which bounds the memory.
            seed: For the draws; torch's global generators are left as they were. None to go on
                with those.

        Returns:
            Shape ``(N, ...)``, or ``(S, N, ...)`` if ``num_samples`` is given. On the device of
            the posterior.

        Raises:
            TypeError: ``x`` is no tensor or array, nor a tuple of such.
            ValueError: ``num_samples`` or ``batch_size`` is below 1, or ``x`` is empty, has NaN or
                does not fit the network.
        """
        network = self._network("predict")
        seed = check_seed(seed)
        if num_samples is None:
            return network.likelihood.mean(self.output(x, threshold, batch_size))
        num_samples = check_count("num_samples", num_samples)
        inputs = inputs_of(x)
        posterior = self if threshold is None else self._pruned(threshold)
        means: Tensor | None = None
        with random_state(seed, self.device), _evaluating(network), local_parameters():
            for draws, rows, output in posterior._drawn_outputs(inputs, num_samples, batch_size):
                mean = network.likelihood.mean(output)
                if means is None:
                    means = mean.new_empty((num_samples, len(inputs[0]), *mean.shape[2:]))
                means[draws, rows] = mean
        assert means is not None
        return means

    def _drawn_outputs(
        self, inputs: tuple[Tensor, ...], num_samples: int, batch_size: int
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """As :func:`outputs_at_draws`, in evaluation mode, which is the caller's business."""
        check_count("batch_size", batch_size)
        outputs = outputs_at_draws(
            self._network("predict"),
            self.guide,
            lambda: self._split(inputs, batch_size),
            num_samples,
            batch_size,
        )
        while True:
            with _explained(inputs, self.dtype):  # not what is done with them
                found = next(outputs, None)
            if found is None:
                return
            yield found

    def _pruned(self, threshold: float) -> Posterior:
        """A copy whose guide has point masses at zero where ``log alpha >= threshold``."""
        guide = self.guide.copy_for(self.model)
        guide.prune_(check_threshold(threshold))
        return Posterior(self.model, guide, threshold=threshold, drawn=self.drawn)

    def predictive(
        self,
        x: Any,
        num_samples: int = 100,
        *,
        method: Method = "weights",
        batch_size: int = _PREDICTION_BATCH,
        seed: int | None = None,
        threshold: float | None = None,
        keep_draws: bool = False,
    ) -> ClassificationPredictive | RegressionPredictive:
        """The distribution of ``y`` given ``x``, weights integrated over the posterior.

        Not pruned, unless ``threshold`` is given. See :func:`bayes_svdo.analysis.predictive`.
        """
        from bayes_svdo.analysis.uncertainty import predictive

        return predictive(
            self,
            x,
            num_samples,
            method,
            batch_size,
            seed,
            threshold=threshold,
            keep_draws=keep_draws,
        )

    def to_arviz(
        self,
        x: Any = None,
        y: Any = None,
        draws: int = 1000,
        *,
        sites: str | Iterable[str] | None = None,
        surviving_only: bool = True,
        threshold: float | None = None,
        seed: int | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        batch_size: int = _PREDICTION_BATCH,
        max_bytes: int = 2 * 2**30,
    ) -> Any:
        """Draws of the weights, what they predict for ``x`` and how well it goes with ``y``.

        ``arviz.InferenceData`` (ArviZ 0.2x) or ``xarray.DataTree`` (1.x). See
        :func:`bayes_svdo.analysis.to_arviz.to_arviz`.
        """
        from bayes_svdo.analysis.to_arviz import to_arviz

        return to_arviz(
            self,
            x,
            y,
            draws,
            sites=sites,
            surviving_only=surviving_only,
            threshold=threshold,
            seed=seed,
            coords=coords,
            batch_size=batch_size,
            max_bytes=max_bytes,
        )

    def _split(self, inputs: tuple[Tensor, ...], batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        check_count("batch_size", batch_size)
        device = self.device
        for parts in zip(*(value.split(batch_size) for value in inputs), strict=True):
            yield tuple(part.to(device) for part in parts)

    @property
    def device(self) -> torch.device:
        """Where the posterior's parameters are."""
        return next(self.guide.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """That of the posterior's parameters."""
        return next(self.guide.parameters()).dtype

    def to(self, device: str | torch.device) -> Posterior:
        """Move model and guide to a device, in place.

        Args:
            device: As for ``fit``.

        Raises:
            ValueError: The device is unknown, or not there.
        """
        where = choose_device(device)
        self.guide.to(where)
        if isinstance(self.model, nn.Module):
            self.model.to(where)
        return self

    def summary(self, threshold: float | None = None) -> str:
        """The sparsity table as text."""
        return str(self.sparsity(threshold))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the posterior to a folder: tensors as safetensors, the rest as JSON.

        See :func:`bayes_svdo.inference.checkpoints.save_posterior`.
        """
        from bayes_svdo.inference.checkpoints import save_posterior

        return save_posterior(self, path)

    @staticmethod
    def load(
        path: str | os.PathLike[str],
        net: nn.Module | None = None,
        model: Callable[..., Any] | None = None,
    ) -> Posterior:
        """Read a folder that :meth:`save` wrote.

        See :func:`bayes_svdo.inference.checkpoints.load_posterior`.
        """
        from bayes_svdo.inference.checkpoints import load_posterior

        return load_posterior(path, net, model)

    def _network(self, purpose: str) -> BayesianNetwork:
        if not isinstance(self.model, BayesianNetwork):
            remedy = (
                "posterior.means(), which are zero where pruned"
                if purpose == "prune"
                else "pyro.infer.Predictive(posterior.guide.model, guide=posterior.guide, "
                "num_samples=...)"
            )
            raise TypeError(
                f"{purpose} needs a BayesianNetwork, but the model is "
                f"{getattr(self.model, '__name__', type(self.model).__name__)}, a hand-written "
                f"Pyro model.\n  Try {remedy}."
            )
        return self.model

    def _threshold(self, threshold: float | None) -> float:
        return self.threshold if threshold is None else check_threshold(threshold)

    def __repr__(self) -> str:
        sites = ", ".join(self.guide.sites)
        return f"Posterior({sites}; threshold={self.threshold}, epochs={len(self.history)})"


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _explained(x: tuple[Tensor, ...], dtype: torch.dtype) -> Iterator[None]:
    """Say what ``x`` was where the network, of weights of this dtype, cannot take it."""
    try:
        yield
    except (torch.OutOfMemoryError, OutputError):
        raise
    except (RuntimeError, IndexError, TypeError) as error:
        shown = ", ".join(f"shape {tuple(v.shape)}, dtype {v.dtype}" for v in x)
        hint = dtype_hint(x, dtype)
        raise ValueError(f"the network cannot take x of {shown}: {error}{hint}") from error


def dtype_hint(x: Any, dtype: torch.dtype) -> str:
    """What to try where the inputs, or some of them, are not of the weights' dtype."""
    inputs = x if isinstance(x, tuple) else (x,)
    dtypes = [torch.as_tensor(value).dtype for value in inputs if hasattr(value, "dtype")]
    if all(each == dtype for each in dtypes):
        return ""
    return (
        f"\n  Try torch.as_tensor(x, dtype={dtype}), the dtype of the network's weights, if x "
        "holds numbers."
    )


@contextmanager
def local_parameters() -> Iterator[None]:
    """An empty parameter store for the time being: modules keep their own parameters.

    In Pyro's global store two guides of the same class would share parameters by name. That frozen
    ones are not in the store, of which Pyro warns, is as it should be.
    """
    with pyro.get_param_store().scope(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\S+ was not registered in the param store because req")
        yield
