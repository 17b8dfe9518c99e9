"""Stochastic variational inference: ``fit`` a model and get its posterior."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import pyro
import torch
from lightning_fabric import Fabric
from pyro import poutine
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayes_svdo._names import unknown_name
from bayes_svdo.inference.batches import Batches, Data, TensorBatches, make_batches
from bayes_svdo.inference.elbo import TraceAnalyticKL_ELBO
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.history import Row
from bayes_svdo.inference.posterior import Posterior, check_threshold, local_parameters
from bayes_svdo.inference.schedules import ConstantThenLinear, KLWarmup, Schedule
from bayes_svdo.models import BayesianNetwork

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
# Reading the objective back makes a CPU wait for the GPU: done this often there, in steps.
_STEPS_BETWEEN_READS = 50
_EVALUATION_BATCH = 1000


class EpochEnd(NamedTuple):
    """What a callback sees after each epoch.

    Attributes:
        epoch: Counted from 1.
        row: The epoch's row of the history.
        posterior: The posterior so far; live, so copy what you keep.
    """

    epoch: int
    row: Row
    posterior: Posterior


Callback = Callable[[EpochEnd], object]


class NonFiniteObjectiveError(FloatingPointError):
    """Training met an objective that is NaN or infinite, and stopped.

    Attributes:
        epoch: Epoch, counted from 1.
        step: Step within the epoch, counted from 1.
        sites: The sites whose term is not finite.
    """

    def __init__(self, epoch: int, step: int, sites: Sequence[str], detail: str) -> None:
        self.epoch, self.step, self.sites = epoch, step, tuple(sites)
        names = ", ".join(f'"{site}"' for site in sites)
        super().__init__(
            f"the objective is not finite at epoch {epoch}, step {step}, because of site {names}.\n"
            f"  {detail}\n"
            "  Try a smaller lr, inputs of a smaller scale, or a smaller initial sigma."
        )


def fit(
    model: Callable[..., Any],
    train: Data,
    *,
    guide: AdditiveNoiseGuide | None = None,
    elbo: TraceAnalyticKL_ELBO | None = None,
    epochs: int = 100,
    batch_size: int | None = None,
    lr: float = 1e-3,
    sigma_lr: float | None = None,
    lr_schedule: Schedule | None = None,
    kl_warmup: Schedule | tuple[float, float] = (0.025, 0.1),
    validation: Data | None = None,
    device: str | torch.device = "auto",
    precision: str = "32-true",
    threshold: float = 3.0,
    prune_while_training: bool = False,
    callbacks: Sequence[Callback] = (),
    seed: int | None = None,
    progress: bool = True,
) -> Posterior:
    """Fit a guide to a model by SVI, with Adam.

    Minimises ``(E_q[-log p(y|x,w)] + kl_weight * KL[q‖p]) / num_data``. Model and guide are
    copied: what is passed in stays as it is, and what is learned is in the posterior that comes
    back. For a warm start pass the ``model`` and ``guide`` of an earlier posterior.

    Args:
        model: A :class:`~bayes_svdo.models.BayesianNetwork`, or any Pyro model ``model(x, y)``
            whose point estimates, if any, are parameters of an ``nn.Module``.
        train: A pair of tensors ``(x, y)``, a Dataset or a DataLoader. Tensors live on the device
            if they fit, and are shuffled there.
        guide: An unfitted or an earlier guide; ``AdditiveNoiseGuide(model)`` if None.
        elbo: The objective; ``TraceAnalyticKL_ELBO()`` if None. Its own ``kl_weight`` multiplies
            the warm-up's.
        epochs: Passes over the data.
        batch_size: Data points per step (100 if None); a DataLoader has its own.
        lr: Adam's learning rate for means and point estimates.
        sigma_lr: Learning rate of ``log_sigma2``; ``lr`` if None. Adam moves by at most this per
            step, so a way from -10 to -3 takes at least ``7 / sigma_lr`` steps.
        lr_schedule: Factor on both rates; constant for half of training, then linear to 0, if None.
        kl_warmup: Weight of the KL: fractions of training between which it rises from 0 to 1, or a
            function of the fraction of steps done.
        validation: Data as ``train``; the pruned mean network is evaluated on it every epoch.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        precision: ``"32-true"``, ``"64-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        threshold: A weight counts as pruned where ``log alpha >= threshold``.
        prune_while_training: Zero such weights for good, at the end of every epoch from the one in
            which the KL first has full weight: the ``train_clip`` of the paper's code.
        callbacks: Called after every epoch with an :class:`EpochEnd`; one that returns ``True``
            ends training.
        seed: Makes the run reproducible and leaves the global random state as it was. None
            continues the global stream.
        progress: Show a progress bar.

    Returns:
        The posterior, on the device it was trained on. Ctrl-C ends training early with a warning
        and the posterior so far.

    Raises:
        TypeError, ValueError: An argument, or the data, cannot be used; named before any training.
        NonFiniteObjectiveError: The objective became NaN or infinite.
    """
    _check_settings(epochs, lr, sigma_lr, precision, threshold)
    warmup = KLWarmup(*kl_warmup) if isinstance(kl_warmup, tuple) else kl_warmup
    where = _device(device)
    with ExitStack() as stack:
        stack.enter_context(_random_state(seed, where))
        stack.enter_context(local_parameters())
        stack.enter_context(_denormals_flushed(where))
        fabric = Fabric(
            accelerator=where.type,
            devices=[where.index or 0] if where.type != "cpu" else 1,
            precision=precision,  # type: ignore[arg-type]
        )
        dtype = torch.float64 if precision == "64-true" else None
        batches = make_batches(train, batch_size, where, "train", dtype=dtype)
        held_out = None if validation is None else _held_out(validation, where, dtype)
        model, guide = _own_copies(model, guide, batches)
        posterior = Posterior(model, guide, threshold=threshold)
        objective = _Objective(model, guide, elbo or TraceAnalyticKL_ELBO()).to(where, dtype)
        _check_data(posterior, batches, "train")
        if held_out is not None:
            _check_data(posterior, held_out, "validation")
        if not isinstance(model, BayesianNetwork):
            _check_parameters(objective, batches)
        run = _Run(
            fabric=fabric,
            posterior=posterior,
            objective=objective,
            batches=batches,
            validation=held_out,
            epochs=epochs,
            rates=(lr, lr if sigma_lr is None else sigma_lr),
            lr_schedule=lr_schedule or ConstantThenLinear(),
            kl_warmup=warmup,
            prune_while_training=prune_while_training,
            callbacks=callbacks,
        )
        run.train(progress)
    return posterior


class _Objective(nn.Module):
    """Model, guide and ELBO as one module: a batch to a vector of terms and a sum of scores."""

    def __init__(self, model: Any, guide: AdditiveNoiseGuide, elbo: TraceAnalyticKL_ELBO) -> None:
        super().__init__()
        self.model, self.guide, self.elbo = model, guide, elbo
        self.names: list[str] = []

    def forward(self, *batch: Any) -> tuple[Tensor, Tensor]:
        """``(nll, kl of each site)`` of shape (1 + sites,), and the batch's summed metric."""
        terms = self.elbo.terms(self.model, self.guide, *batch)
        self.names = list(terms.kl)
        vector = torch.stack([terms.nll, *terms.kl.values()])
        if not isinstance(self.model, BayesianNetwork):
            return vector, vector.new_zeros(())
        output = terms.output.detach()
        if output.dim() > batch[1].dim() + 1:  # vectorised particles
            output = output.mean(0)
        return vector, self.model.likelihood.score(output, batch[1]).sum()


class _Run:
    """One training run."""

    def __init__(
        self,
        *,
        fabric: Fabric,
        posterior: Posterior,
        objective: _Objective,
        batches: Batches,
        validation: Batches | None,
        epochs: int,
        rates: tuple[float, float],
        lr_schedule: Schedule,
        kl_warmup: Schedule,
        prune_while_training: bool,
        callbacks: Sequence[Callback],
    ) -> None:
        self.fabric, self.posterior, self.batches = fabric, posterior, batches
        self.validation, self.epochs, self.rates = validation, epochs, rates
        self.lr_schedule, self.kl_warmup = lr_schedule, kl_warmup
        self.prune_while_training, self.callbacks = prune_while_training, callbacks
        self.core = objective
        self.num_data = batches.num_data or _num_data(posterior.model) or 1
        self.objective, self.optimizer = fabric.setup(objective, self._optimizer(objective))
        self.kl_weight = 0.0
        self.elbo_kl_weight = objective.elbo.kl_weight

    def _optimizer(self, objective: _Objective) -> torch.optim.Optimizer:
        sigma = {id(p) for p in objective.guide.sigma_parameters()}
        others = [p for p in objective.parameters() if p.requires_grad and id(p) not in sigma]
        groups = [
            {"params": others, "lr": self.rates[0], "base_lr": self.rates[0]},
            {
                "params": objective.guide.sigma_parameters(),
                "lr": self.rates[1],
                "base_lr": self.rates[1],
            },
        ]
        return torch.optim.Adam(groups, fused=True)

    def train(self, progress: bool) -> None:
        posterior = self.posterior
        posterior.stopped_because = f"all {self.epochs} epochs were done"
        with tqdm(total=self.epochs, unit="epoch", disable=not progress) as bar:
            try:
                for epoch in range(1, self.epochs + 1):
                    row = self._epoch(epoch)
                    posterior.history.append(row)
                    bar.set_postfix(self._shown(row))
                    bar.update()
                    end = EpochEnd(epoch, row, posterior)
                    if True in [callback(end) for callback in self.callbacks]:
                        posterior.stopped_because = f"a callback ended training at epoch {epoch}"
                        break
            except KeyboardInterrupt:
                done = len(posterior.history)
                posterior.stopped_because = f"interrupted after epoch {done} of {self.epochs}"
                warnings.warn(
                    f"training was {posterior.stopped_because}; this is the posterior so far.",
                    stacklevel=3,
                )
        if isinstance(posterior.model, nn.Module):
            posterior.model.eval()

    def _epoch(self, epoch: int) -> Row:
        started = time.perf_counter()
        if isinstance(self.posterior.model, nn.Module):
            self.posterior.model.train()
        steps = len(self.batches)
        record: Tensor | None = None
        score: Any = 0.0
        weights = []
        wait = 1 if self.fabric.device.type == "cpu" else _STEPS_BETWEEN_READS
        for step, batch in enumerate(self.batches):
            done = (epoch - 1) * steps + step
            terms, batch_score = self._step(batch, done / (self.epochs * steps), first=done == 0)
            weights.append(self.kl_weight)
            if record is None:
                record = terms.new_zeros(steps, len(terms))
            record[step] = terms
            score = score + batch_score
            if (step + 1) % wait == 0 or step + 1 == steps:
                self._check_finite(record[: step + 1], epoch)
        if record is None:
            raise ValueError("train gave no batches.")
        return self._row(epoch, record, weights, score, started)

    def _step(self, batch: tuple[Any, ...], progress: float, first: bool) -> tuple[Tensor, Tensor]:
        factor = self.lr_schedule(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.kl_weight = self.kl_warmup(progress)
        self.optimizer.zero_grad()
        # Pyro's checks of shapes and arguments read values back: once is enough.
        with pyro.validation_enabled(first and pyro.settings.get("validate_distributions_pyro")):
            terms, score = self.objective(*batch)
        kl = terms[1:].sum() * (self.kl_weight * self.elbo_kl_weight)
        self.fabric.backward((terms[0] + kl) / self.num_data)
        self.optimizer.step()
        return terms.detach(), score.detach()

    def _check_finite(self, record: Tensor, epoch: int) -> None:
        if record.sum().isfinite():
            return
        finite = record.isfinite()
        if finite.all():  # the sum overflowed, not its terms
            return
        step = int((~finite).any(1).nonzero()[0])
        names = ["y", *self.core.names]
        sites = [name for name, ok in zip(names, finite[step].tolist(), strict=True) if not ok]
        raise NonFiniteObjectiveError(epoch, step + 1, sites, self._diagnosis(sites))

    @torch.no_grad()
    def _diagnosis(self, sites: Sequence[str]) -> str:
        for name in self.posterior.guide.sites:
            for part, value in zip(
                ("loc", "log_sigma2"), self.posterior.guide.parameters_of(name), strict=True
            ):
                bad = int((~value.isfinite()).sum())
                if bad:
                    return (
                        f'{bad} of the {value.numel()} values of {part} at "{name}" are not finite.'
                    )
        if sites == ["y"]:
            return "the likelihood of the batch is not finite, though all parameters are."
        return "its KL is not finite, though all parameters are."

    @torch.no_grad()
    def _row(
        self, epoch: int, record: Tensor, weights: list[float], score: Any, started: float
    ) -> Row:
        posterior = self.posterior
        kl = record[:, 1:].sum(1)
        scale = torch.tensor(weights, dtype=kl.dtype, device=kl.device) * self.elbo_kl_weight
        if self.prune_while_training and self.kl_weight >= 1.0:
            posterior.guide.prune_(posterior.threshold)
        row: Row = {
            "epoch": epoch,
            "step": epoch * len(self.batches),
            "nll": float(record[:, 0].mean()) / self.num_data,
            "kl": float(kl.mean()),
            "objective": float((record[:, 0] + scale * kl).mean()) / self.num_data,
            "kl_weight": self.kl_weight,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        model = posterior.model
        if isinstance(model, BayesianNetwork):
            metric = model.likelihood.metric.lower()
            row[metric] = model.likelihood.reduce(torch.as_tensor(score) / self.num_data)
        total, nonzero = 0, 0
        for index, (name, log_alpha) in enumerate(posterior.log_alpha().items()):
            kept = int((log_alpha < posterior.threshold).sum())
            row[f"kl/{self.core.names[index]}"] = float(record[:, 1 + index].mean())
            row[f"sparsity/{name}"] = 100.0 * (1 - kept / log_alpha.numel())
            total, nonzero = total + log_alpha.numel(), nonzero + kept
        row["nonzero"] = nonzero
        row["compression"] = total / nonzero if nonzero else math.inf
        if self.validation is not None:
            row |= evaluate(posterior, self.validation)
        row["seconds"] = time.perf_counter() - started
        return row

    def _shown(self, row: Row) -> dict[str, str]:
        shown = {"nll": f"{row['nll']:.4f}", "kl": f"{row['kl']:.0f}"}
        for metric in ("accuracy", "rmse"):
            for name in (metric, f"validation_{metric}"):
                if name in row:
                    shown[name.replace("validation", "val")] = f"{row[name]:.4f}"
        return shown | {"compression": f"{row['compression']:.1f}x"}


@torch.no_grad()
def evaluate(
    posterior: Posterior, data: Batches, threshold: float | None = None, prefix: str = "validation"
) -> Row:
    """The pruned mean network on labelled data.

    Returns:
        ``<prefix>_<metric>`` (accuracy, rmse) and ``<prefix>_nll`` (nats per data point).
    """
    model = posterior._network()
    scores, nll = [], 0.0
    for x, y in data:
        output = posterior.output(x, threshold)
        scores.append(model.likelihood.score(output, y))
        nll -= float(model.likelihood.distribution(output).log_prob(y).sum())
    joined = torch.cat(scores)
    return {
        f"{prefix}_{model.likelihood.metric.lower()}": model.likelihood.reduce(joined),
        f"{prefix}_nll": nll / len(joined),
    }


def _held_out(validation: Data, device: torch.device, dtype: torch.dtype | None) -> Batches:
    batches = make_batches(validation, None, device, "validation", shuffle=False, dtype=dtype)
    if isinstance(batches, TensorBatches):
        batches.batch_size = min(_EVALUATION_BATCH, len(batches.tensors[0]))
    return batches


def _check_settings(
    epochs: int, lr: float, sigma_lr: float | None, precision: str, threshold: float
) -> None:
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 0:
        raise ValueError(f"epochs must be an integer of at least 0, but is {epochs!r}.")
    for name, rate in (("lr", lr), ("sigma_lr", sigma_lr)):
        if rate is not None and not 0 < rate < math.inf:
            raise ValueError(f"{name} must be a positive number, but is {rate!r}.")
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    check_threshold(threshold)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise unknown_name("device", device, ("auto", "cpu", "cuda", "cuda:0")) from None
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= count:
            raise ValueError(
                f'device "{device}" is not available: this machine has {count} CUDA devices.'
            )
        return torch.device("cuda", where.index or 0)
    if where.type != "cpu":
        raise unknown_name("device", device, ("auto", "cpu", "cuda", "cuda:0"))
    return where


def _own_copies(
    model: Callable[..., Any], guide: AdditiveNoiseGuide | None, batches: Batches
) -> tuple[Callable[..., Any], AdditiveNoiseGuide]:
    if not callable(model):
        raise TypeError(f"model must be callable, but is a {type(model).__name__}.")
    guide = AdditiveNoiseGuide(model) if guide is None else guide
    if not isinstance(guide, AdditiveNoiseGuide):
        raise TypeError(
            f"guide must be an AdditiveNoiseGuide, but is a {type(guide).__name__}.\n"
            "  Try pyro.infer.SVI with TraceAnalyticKL_ELBO, which takes any guide."
        )
    if guide.prototype_trace is None:
        guide(*batches.first())
    if isinstance(model, BayesianNetwork) and guide.sites != model.sites:
        raise ValueError(f"guide is for the sites {guide.sites}, but the model has {model.sites}.")
    own_model = deepcopy(model) if isinstance(model, nn.Module) else model
    return own_model, deepcopy(guide)


@torch.no_grad()
def _check_parameters(objective: _Objective, batches: Batches) -> None:
    """Refuse ``pyro.param`` statements that no module holds: the optimizer would not see them."""
    with poutine.trace(param_only=True) as captured:
        objective(*batches.first())
    own = {id(parameter) for parameter in objective.parameters()}
    nodes: dict[str, Any] = captured.trace.nodes
    for name, site in nodes.items():
        if id(site["value"].unconstrained()) not in own:
            raise ValueError(
                f'the model has a parameter "{name}" of Pyro\'s global store, which fit would not '
                "train.\n  Try a PyroModule with a PyroParam, or Pyro's own SVI."
            )


def _num_data(model: Any) -> int | None:
    return model.num_data if isinstance(model, BayesianNetwork) else None


def _check_data(posterior: Posterior, batches: Batches, name: str) -> None:
    """Refuse data that the network or its likelihood cannot take, before training starts."""
    model = posterior.model
    if not isinstance(model, BayesianNetwork):
        return
    if name == "train" and batches.num_data is not None and batches.num_data != model.num_data:
        raise ValueError(
            f"the model was made with num_data={model.num_data}, but {name} holds "
            f"{batches.num_data} data points.\n"
            f"  Try BayesianNetwork(..., num_data={batches.num_data})."
        )
    batch = batches.first()
    if len(batch) != 2:
        raise TypeError(f"{name} must give pairs (x, y), but gives {len(batch)} elements a batch.")
    x, y = batch
    few = tuple(v[:2] for v in x) if isinstance(x, tuple) else x[:2]
    try:
        output = posterior.output(few)
    except Exception as error:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        dtype = f", dtype {x.dtype}" if isinstance(x, Tensor) else ""
        raise ValueError(
            f"the network cannot take {name} x of shape {shape}{dtype} (a batch): {error}"
        ) from error
    targets = batches.tensors[-1] if isinstance(batches, TensorBatches) else y
    model.likelihood.check(targets, output, f"{name} y")


@contextmanager
def _random_state(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def _denormals_flushed(device: torch.device) -> Iterator[None]:
    """Dead weights end as denormals, on which a CPU is ten times slower."""
    if device.type != "cpu":
        yield
        return
    smallest = torch.tensor(torch.finfo(torch.float32).smallest_normal) / 2
    already = not bool(smallest * 1.0)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(already)
