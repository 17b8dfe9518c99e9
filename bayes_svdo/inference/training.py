"""The training loop of ``fit``: steps, epochs, what is recorded, and when it stops."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from bayes_svdo.inference.adam import Adam
from bayes_svdo.inference.batches import Batches
from bayes_svdo.inference.checks import BatchCheck
from bayes_svdo.inference.compiled import CompiledObjective
from bayes_svdo.inference.devices import Ranks
from bayes_svdo.inference.history import Row
from bayes_svdo.inference.objective import Objective
from bayes_svdo.inference.posterior import Posterior
from bayes_svdo.inference.schedules import Schedule, value_at
from bayes_svdo.inference.surroundings import pyro_checks
from bayes_svdo.models import BayesianNetwork

# How often the objective is read back from a GPU.
_STEPS_BETWEEN_READS = 50


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
    """Training met an objective, or led to a parameter, that is NaN or infinite, and stopped.

    Attributes:
        epoch: Epoch, counted from 1.
        step: Step within the epoch, counted from 1.
        sites: The sites whose term is not finite; names of parameters, if those are not.
    """

    def __init__(
        self, epoch: int, step: int, sites: Sequence[str], detail: str, what: str = "the objective"
    ) -> None:
        self.epoch, self.step, self.sites = epoch, step, tuple(sites)
        names = ", ".join(f'"{site}"' for site in sites)
        super().__init__(
            f"{what} is not finite at epoch {epoch}, step {step}, because of site {names}.\n"
            f"  {detail}\n"
            "  Try a smaller lr, inputs of a smaller scale, or a smaller initial sigma."
        )


class TrainingRun:
    """One training run."""

    def __init__(
        self,
        *,
        fabric: Fabric,
        ranks: Ranks,
        posterior: Posterior,
        objective: Objective | CompiledObjective,
        batches: Batches,
        check: BatchCheck | None,
        validation: Batches | None,
        epochs: int,
        rates: tuple[float, float],
        lr_schedule: Schedule,
        kl_warmup: Schedule,
        prune_while_training: bool,
        callbacks: Sequence[Callback],
    ) -> None:
        self.fabric, self.ranks, self.posterior = fabric, ranks, posterior
        self.batches, self.check = batches, check
        self.validation, self.epochs, self.rates = validation, epochs, rates
        self.lr_schedule, self.kl_warmup = lr_schedule, kl_warmup
        self.prune_while_training, self.callbacks = prune_while_training, callbacks
        self.core: Objective = (
            objective.objective if isinstance(objective, CompiledObjective) else objective
        )
        model = posterior.model
        self.num_data = model.num_data if isinstance(model, BayesianNetwork) else batches.num_data
        self.objective, self.optimizer = fabric.setup(objective, self._optimizer(objective))
        # Other ranks' gradients come by way of autograd.
        alone = isinstance(objective, CompiledObjective) and ranks.count == 1
        self.compiled: CompiledObjective | None = objective if alone else None  # type: ignore[assignment]
        self.steps = len(batches)  # of an epoch, as far as is known
        self.steps_done = 0
        self.kl_weight = 0.0
        # A graph takes a tensor; this one yields to the dtype of what it multiplies.
        self._kl_weight = torch.zeros((), dtype=torch.float64, device=fabric.device)
        # Reading a step's objective makes a CPU wait for the GPU, or for other ranks.
        self.delayed = fabric.device.type != "cpu" or ranks.count > 1

    def _optimizer(self, objective: Objective | CompiledObjective) -> torch.optim.Optimizer:
        sigma = self.core.guide.sigma_parameters()
        of_sigma = {id(p) for p in sigma}
        others = [p for p in objective.parameters() if p.requires_grad and id(p) not in of_sigma]
        lr, sigma_lr = self.rates
        groups = [
            {"params": others, "lr": lr, "base_lr": lr},
            {"params": sigma, "lr": sigma_lr, "base_lr": sigma_lr},
        ]
        return Adam(groups)

    def train(self, progress: bool) -> None:
        """All epochs, or until a callback or Ctrl-C ends it."""
        posterior = self.posterior
        posterior.stopped_because = f"all {self.epochs} epochs were done"
        shown = progress and self.ranks.rank == 0
        with tqdm(total=self.epochs, unit="epoch", disable=not shown) as bar:
            try:
                for epoch in range(1, self.epochs + 1):
                    row = self._epoch(epoch)
                    posterior.history.append(row)
                    bar.set_postfix(_shown(row))
                    bar.update()
                    end = EpochEnd(epoch, row, posterior)
                    answers = [callback(end) for callback in self.callbacks]
                    if self.ranks.any(any(map(_is_true, answers))):
                        posterior.stopped_because = f"a callback ended training at epoch {epoch}"
                        break
            except KeyboardInterrupt:
                done = len(posterior.history)
                posterior.stopped_because = f"interrupted after epoch {done} of {self.epochs}"
                with suppress(UserWarning):  # where warnings are errors, the posterior comes first
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
        steps = self.steps
        record: list[Tensor] = []
        score: Any = 0.0
        sizes: list[int] = []
        for step, batch in enumerate(self.batches):
            if self.check is not None and epoch == 1:
                self.check(batch, step + 1)
            # A loader may give more batches than it said.
            done = (epoch - 1) * steps + min(step, steps)
            terms, batch_score = self._forward(batch, done / (self.epochs * steps), done == 0)
            record.append(terms.detach())
            score = score + batch_score
            sizes.append(len(batch[-1]))
            if not self.delayed:
                self._check_finite(record[-1:], epoch, step)
            elif len(record) % _STEPS_BETWEEN_READS == 0:
                self._check_finite(record[-_STEPS_BETWEEN_READS:], epoch, step)
            if self.compiled is None:
                self.fabric.backward(terms[0])
            self.optimizer.step()
        if not record:
            raise ValueError(f"train gives no batches in epoch {epoch}.")
        self._check_finite(record[-_STEPS_BETWEEN_READS:], epoch, len(record) - 1)
        self._check_parameters_finite(epoch, len(record))
        if epoch == 1 and self.ranks.count == 1:
            self._check_num_data(sum(sizes))
        self.steps = len(record)
        self.steps_done += len(record)
        self._average_statistics()
        return self._row(epoch, *self._averages(record, score, sizes), started)

    def _averages(
        self, record: Sequence[Tensor], score: Any, sizes: Sequence[int]
    ) -> tuple[list[float], Tensor]:
        """The epoch's terms and score over the data points of all ranks.

        Each step's terms stand for all data: a smaller batch says less of them.
        """
        device = record[0].device
        weights = torch.tensor(sizes, dtype=torch.float64, device=device)
        sums = torch.cat(
            [
                (weights[:, None] * torch.stack(list(record))).sum(0),
                torch.as_tensor(score, dtype=torch.float64, device=device)[None],
                weights.sum()[None],
            ]
        )
        averages = self.ranks.total(sums)
        averages = averages[:-1] / averages[-1]
        return averages[:-1].tolist(), averages[-1]

    @torch.no_grad()
    def _average_statistics(self) -> None:
        """Batch normalisation has seen other data on every rank."""
        if self.ranks.count > 1 and isinstance(self.posterior.model, BayesianNetwork):
            for module in self.posterior.model.net.modules():
                if isinstance(module, _BatchNorm) and module.track_running_stats:
                    for value in (module.running_mean, module.running_var):
                        if value is not None:
                            value.copy_(self.ranks.mean(value))

    def _check_num_data(self, seen: int) -> None:
        """Refuse the number of data points that a first epoch has disproved."""
        model = self.posterior.model
        if not isinstance(model, BayesianNetwork):
            return
        if not self.batches.can_be_all_of(model.num_data, seen):
            raise ValueError(
                f"the model was made with num_data={model.num_data}, but train gave {seen} data "
                f"points in the first epoch.\n  Try BayesianNetwork(..., num_data={seen})."
            )

    def _forward(
        self, batch: tuple[Any, ...], progress: float, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss, negative log likelihoods and KLs, in this order; and the summed metric."""
        factor = value_at(self.lr_schedule, progress, "lr_schedule")
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.kl_weight = value_at(self.kl_warmup, progress, "kl_warmup")
        weight = self._kl_weight.fill_(self.kl_weight)
        with pyro_checks(structure=first):
            if self.compiled is None:
                self.optimizer.zero_grad()
                value = self.objective(weight, *batch)
            else:
                with self.fabric.autocast():
                    value = self.compiled.set_gradients(weight, *batch)
        return torch.cat([value.loss[None], value.terms]), value.score

    def _check_finite(self, record: Sequence[Tensor], epoch: int, last: int) -> None:
        """Refuse terms that are not finite; the last ones are those of step ``last``, from 0."""
        terms = self.ranks.mean(torch.stack(list(record)))
        finite = terms.isfinite()
        if finite.all():
            return
        step = int((~finite).any(1).nonzero()[0])
        names = ["the sum of all terms", *self.core.observed, *self.core.latent]
        bad = [name for name, ok in zip(names, finite[step].tolist(), strict=True) if not ok]
        bad = bad[1:] or bad
        if self.delayed:  # what the parameters are now, they have become since
            detail = "It was not finite in the first place; parameters may have followed since."
        else:
            detail = self._detail(bad, self._not_finite())
        raise NonFiniteObjectiveError(epoch, last + 2 - len(record) + step, bad, detail)

    def _check_parameters_finite(self, epoch: int, steps: int) -> None:
        bad = self._not_finite()
        if bad:
            detail = self._detail([], bad)
            raise NonFiniteObjectiveError(epoch, steps, list(bad), detail, "the posterior")

    @torch.no_grad()
    def _not_finite(self) -> dict[str, str]:
        """Which parameters are not finite: by site, or by the name of a point estimate."""
        guide, bad = self.posterior.guide, {}
        for site in guide.sites:
            for part, value in zip(("loc", "log_sigma2"), guide.parameters_of(site), strict=True):
                if not value.isfinite().all():
                    count = int((~value.isfinite()).sum())
                    bad[site] = f"{count} of the {value.numel()} values of its {part}"
        if isinstance(self.posterior.model, nn.Module):
            for name, value in self.posterior.model.named_parameters():
                if not value.isfinite().all():
                    count = int((~value.isfinite()).sum())
                    bad[name] = f"{count} of the {value.numel()} values of this point estimate"
        return bad

    def _detail(self, sites: Sequence[str], parameters: dict[str, str]) -> str:
        if parameters:
            name, what = next(iter(parameters.items()))
            return f'At "{name}", {what} are not finite.'
        if set(sites) & set(self.core.observed):
            return "Its log likelihood is not finite, though all parameters are."
        if set(sites) & set(self.core.latent):
            return "Its KL is not finite, though all parameters are."
        return "It overflows, though none of its terms does."

    def _has_full_weight(self, epoch: int) -> bool:
        """Whether the KL counts in full at the end of an epoch.

        A warm-up that ends with training reaches 1 when the last step is done.
        """
        if epoch == self.epochs and self.kl_weight < 1.0:
            return value_at(self.kl_warmup, 1.0, "kl_warmup") >= 1.0
        return self.kl_weight >= 1.0

    @torch.no_grad()
    def _row(self, epoch: int, terms: list[float], score: Tensor, started: float) -> Row:
        posterior, num_data = self.posterior, self.num_data or 1
        if self.prune_while_training and self._has_full_weight(epoch):
            posterior.guide.prune_(posterior.threshold)
        means = dict(zip(("", *self.core.observed, *self.core.latent), terms, strict=True))
        row: Row = {
            "epoch": epoch,
            "step": self.steps_done,
            "nll": sum(means[name] for name in self.core.observed) / num_data,
            "kl": sum(means[name] for name in self.core.latent),
            "objective": means[""],
            "kl_weight": float(self.kl_weight * self.core.elbo.kl_weight),
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        model = posterior.model
        if isinstance(model, BayesianNetwork):
            row[model.likelihood.metric.lower()] = model.likelihood.reduce(score[None])
        row |= {f"kl/{name}": means[name] for name in self.core.latent}
        total, nonzero = 0, 0
        for name, pruned in posterior.guide.is_pruned(posterior.threshold).items():
            kept = int((~pruned).sum())
            row[f"sparsity/{name}"] = 100.0 * (1 - kept / pruned.numel())
            total, nonzero = total + pruned.numel(), nonzero + kept
        row["nonzero"] = nonzero
        row["compression"] = total / nonzero if nonzero else math.inf
        if self.validation is not None:
            row |= evaluate(posterior, self.validation)
        row["seconds"] = time.perf_counter() - started
        return row


@torch.no_grad()
def evaluate(
    posterior: Posterior, data: Batches, threshold: float | None = None, prefix: str = "validation"
) -> Row:
    """The pruned mean network on labelled data.

    Returns:
        ``<prefix>_<metric>`` (accuracy, rmse) and ``<prefix>_nll`` (nats per data point).

    Raises:
        ValueError: There are no data.
    """
    model = posterior._network("evaluate")
    weights = posterior.means(threshold)
    scores, nll = [], 0.0
    for x, y in data:
        output = posterior._output(weights, x)
        scores.append(model.likelihood.score(output, y))
        nll -= float(model.likelihood.distribution(output).log_prob(y).sum())
    if not scores:
        raise ValueError(f"{prefix} gives no batches when it is read again.")
    joined = torch.cat(scores)
    return {
        f"{prefix}_{model.likelihood.metric.lower()}": model.likelihood.reduce(joined),
        f"{prefix}_nll": nll / len(joined),
    }


def _shown(row: Row) -> dict[str, str]:
    shown = {"nll": f"{row['nll']:.4f}", "kl": f"{row['kl']:.0f}"}
    for metric in ("accuracy", "rmse"):
        for name in (metric, f"validation_{metric}"):
            if name in row:
                shown[name.replace("validation", "val")] = f"{row[name]:.4f}"
    return shown | {"compression": f"{row['compression']:.1f}x"}


def _is_true(answer: object) -> bool:
    return isinstance(answer, (bool, np.bool_)) and bool(answer)
