"""Train a network by name on a data set by name: what ``bayes-svdo fit`` does."""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from bayes_svdo import data
from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.snapshots import Snapshots
from bayes_svdo.data import DataSet
from bayes_svdo.distributions import EmpiricalBayes, LogUniform
from bayes_svdo.distributions.kl import Approximation
from bayes_svdo.experiments import runs
from bayes_svdo.experiments.runs import Run
from bayes_svdo.inference import AdditiveNoiseGuide, EpochEnd, Posterior, fit
from bayes_svdo.inference.arguments import check_seed
from bayes_svdo.inference.devices import is_first_rank
from bayes_svdo.models import BayesianNetwork, Categorical, Gaussian, Likelihood, build

# Of an animation, about: enough to see weights go, few enough for a small file.
_FRAMES = 60

# Not kingma2015: it holds for alpha <= 1 only, and a fresh network has weights beyond.
KLS = (*(kl for kl in get_args(Approximation) if kl != "kingma2015"), "empirical_bayes")


@dataclass(frozen=True)
class Settings:
    """All that a run depends on; the fields are the arguments of ``bayes-svdo fit``.

    Attributes:
        model: A name that :func:`bayes_svdo.models.build` knows.
        data: A name that :func:`bayes_svdo.data.load` knows.
        epochs: Passes over the data.
        batch_size: Data points per step.
        lr: Learning rate of means and point estimates.
        sigma_lr: Learning rate of ``log_sigma2``; ``lr`` if None.
        kl: One of ``KLS``: which KL stands for the log-uniform prior, or the prior
            ``empirical_bayes``.
        kl_warmup: Fractions of training between which the weight of the KL rises from 0 to 1.
        init_log_sigma2: Initial log variance of every weight.
        threshold: A weight is pruned where ``log alpha >= threshold``.
        prune_while_training: Zero such weights for good, at the end of every epoch.
        precision: ``"32-true"``, ``"64-true"``, ``"bf16-mixed"`` or ``"16-mixed"``.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        devices: Processes, one per device; None: as many as a launcher started, else one.
        compile: ``"auto"``, ``"yes"`` or ``"no"``.
        seed: Of initial weights, shuffling and noise.
        root: Folder of the data's files; see :func:`bayes_svdo.data.load`.
    """

    model: str
    data: str
    epochs: int = 100
    batch_size: int = 100
    lr: float = 1e-3
    sigma_lr: float | None = None
    kl: str = "molchanov2017"
    kl_warmup: tuple[float, float] = (0.025, 0.1)
    init_log_sigma2: float = -10.0
    threshold: float = 3.0
    prune_while_training: bool = False
    precision: str = "32-true"
    device: str = "auto"
    devices: int | None = None
    compile: str = "auto"
    seed: int = 0
    root: str | None = None


_COMPILE: dict[str, bool | Literal["auto"]] = {"auto": "auto", "yes": True, "no": False}


class Task(NamedTuple):
    """A data set as a network sees it.

    Regression data are standardised by mean and standard deviation of the training set.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    likelihood: Likelihood
    num_outputs: int
    scaling: dict[str, Any] | None = None


def run(
    settings: Settings,
    out: str | os.PathLike[str],
    *,
    command: str = "fit",
    overwrite: bool = False,
    animation: bool = False,
) -> tuple[Run, list[Path]] | None:
    """Train, evaluate on the test set once, at the end, and write the run folder.

    Ctrl-C while training ends it early; the folder is written all the same.

    Args:
        settings: What to train.
        out: The run folder.
        command: What ``config.json`` calls the command.
        overwrite: Replace a run folder that is there.
        animation: Draw the first layer over the epochs, too.

    Returns:
        The run, and its pictures; None in all processes of several but the first.

    Raises:
        RunError, PermissionError: ``out`` cannot be used; found before any training.
        TypeError, ValueError: A setting cannot be used; found before any training.
        DataNotFoundError, CorruptDataError: The data are not there, or damaged.
        NonFiniteObjectiveError: The objective became NaN or infinite.
    """
    place = runs.check_place(out, overwrite=overwrite)
    dataset = data.load(settings.data, settings.root)
    task = make_task(dataset, settings.precision)
    snapshots = Snapshots(every=max(1, settings.epochs // _FRAMES)) if animation else None
    started = time.perf_counter()
    posterior = train(settings, task, snapshots)
    if not is_first_rank():
        return None
    with runs.uninterrupted():
        done = Run(
            posterior,
            {
                "command": command,
                "settings": asdict(settings),
                "data": _describe(dataset, task),
                **runs.environment(posterior.device),
            },
            _summarise(posterior, task, time.perf_counter() - started),
        )
        runs.save(done, place, overwrite=overwrite)
    return done, runs.draw(done, place, snapshots)


def train(settings: Settings, task: Task, snapshots: Snapshots | None = None) -> Posterior:
    """Train only; arguments and errors as for :func:`run`. Global random state is left alone."""
    check_seed(settings.seed)
    if settings.compile not in _COMPILE:
        raise unknown_name("compile", settings.compile, _COMPILE)
    features = math.prod(task.train[0].shape[1:])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        net = build(settings.model, features, task.num_outputs)
    model = BayesianNetwork(net, task.likelihood, len(task.train[0]), _prior(settings.kl))
    guide = AdditiveNoiseGuide(model, init_log_sigma2=settings.init_log_sigma2)
    terminal = sys.stderr.isatty()
    with warnings.catch_warnings():
        # That Ctrl-C ended training is said where the run is reported.
        warnings.filterwarnings("ignore", "training was interrupted")
        return fit(
            model,
            task.train,
            guide=guide,
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            lr=settings.lr,
            sigma_lr=settings.sigma_lr,
            kl_warmup=settings.kl_warmup,
            device=settings.device,
            devices=settings.devices,
            compile=_COMPILE[settings.compile],
            precision=settings.precision,
            threshold=settings.threshold,
            prune_while_training=settings.prune_while_training,
            seed=settings.seed,
            callbacks=[
                *([] if snapshots is None else [snapshots]),
                *([] if terminal else [_ProgressLines(settings.epochs)]),
            ],
            progress=terminal,
        )


def evaluate(posterior: Posterior, task: Task) -> dict[str, dict[str, float]]:
    """Metrics of the mean network on the test set, before and after pruning.

    Returns:
        For ``before_pruning`` and ``after_pruning``: ``weights``, how many are not zero;
        ``error_percent`` of a classifier or ``rmse`` in units of the target; ``nll`` in nats per
        data point.
    """
    return {
        "before_pruning": _metrics(posterior, task, math.inf),
        "after_pruning": _metrics(posterior, task, posterior.threshold),
    }


def make_task(dataset: DataSet, precision: str = "32-true") -> Task:
    """Targets, likelihood and number of outputs for a data set."""
    if dataset.num_classes is not None:
        return Task(dataset.train, dataset.test, Categorical(), dataset.num_classes)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    (x, y), (x_test, y_test) = dataset.train, dataset.test
    x_mean, x_scale = x.mean(0), _scale(x)
    y_mean, y_scale = y.mean(), _scale(y)

    def standardise(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return ((x - x_mean) / x_scale).to(dtype), ((y - y_mean) / y_scale)[:, None].to(dtype)

    scaling = {
        "x_mean": x_mean.tolist(),
        "x_scale": x_scale.tolist(),
        "y_mean": y_mean.item(),
        "y_scale": y_scale.item(),
    }
    return Task(
        standardise(x, y), standardise(x_test, y_test), Gaussian(noise="learned"), 1, scaling
    )


class _ProgressLines:
    """A callback that writes a line about every tenth of training, where there is no terminal."""

    def __init__(self, epochs: int) -> None:
        self.epochs, self.every = epochs, max(1, epochs // 10)

    def __call__(self, end: EpochEnd) -> None:
        if (end.epoch % self.every and end.epoch not in (1, self.epochs)) or not is_first_rank():
            return
        row = end.row
        metric = next(name for name in ("accuracy", "rmse") if name in row)
        sys.stderr.write(
            f"epoch {end.epoch}/{self.epochs}: nll {row['nll']:.4f}, kl {row['kl']:.0f}, "
            f"{metric} {row[metric]:.4f}, compression {row['compression']:.1f}x\n"
        )
        sys.stderr.flush()


def _prior(kl: str) -> LogUniform | EmpiricalBayes:
    if kl == "kingma2015":
        raise ValueError(
            f'kl "{kl}" holds for alpha <= 1 only, so it cannot prune. Known: {", ".join(KLS)}.\n'
            '  Try LogUniform("kingma2015", extrapolate=True) in Python.'
        )
    if kl not in KLS:
        raise unknown_name("kl", kl, KLS)
    return EmpiricalBayes() if kl == "empirical_bayes" else LogUniform(cast(Approximation, kl))


def _scale(values: Tensor) -> Tensor:
    """Standard deviation of each column; 1 for a constant one."""
    scale = values.std(0, correction=0)
    return scale.where(scale > 0, 1.0)


@torch.no_grad()
def _metrics(posterior: Posterior, task: Task, threshold: float) -> dict[str, float]:
    x, y = task.test
    dtype = next(posterior.guide.parameters()).dtype
    output = posterior.output(x.to(dtype), threshold)
    y = y.to(output.device, dtype if y.is_floating_point() else None)
    likelihood = cast(BayesianNetwork, posterior.model).likelihood
    metric = likelihood.reduce(likelihood.score(output, y).double())
    nll = -float(likelihood.distribution(output).log_prob(y).mean())
    weights = sum(int(mean.count_nonzero()) for mean in posterior.means(threshold).values())
    if task.scaling is None:
        return {"weights": weights, "error_percent": 100 * (1 - metric), "nll": nll}
    unit = task.scaling["y_scale"]
    return {"weights": weights, "rmse": metric * unit, "nll": nll + math.log(unit)}


def _summarise(posterior: Posterior, task: Task, seconds: float) -> dict[str, Any]:
    return {
        "stopped_because": posterior.stopped_because,
        "interrupted": posterior.stopped_because.startswith("interrupted"),
        "epochs": len(posterior.history),
        "seconds": seconds,
        "test": evaluate(posterior, task),
        "train": posterior.history[-1] if len(posterior.history) else None,
        "sparsity": posterior.sparsity().to_dict(),
    }


def _describe(dataset: DataSet, task: Task) -> dict[str, Any]:
    return {
        "name": dataset.name,
        "train": len(dataset.x_train),
        "test": len(dataset.x_test),
        "inputs": list(dataset.x_train.shape[1:]),
        "classes": dataset.num_classes,
        "scaling": task.scaling,
    }
