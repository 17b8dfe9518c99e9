"""Stochastic variational inference: ``fit`` a model and get its posterior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import nn

from bayes_svdo._signatures import check_takes
from bayes_svdo.inference.arguments import (
    check_count,
    check_functions,
    check_rate,
    check_seed,
)
from bayes_svdo.inference.batches import Batches, Data, LoaderBatches, TensorBatches, make_batches
from bayes_svdo.inference.checks import (
    BatchCheck,
    check_batch,
    check_guide,
    check_last_batch,
    check_model,
    check_parameters,
    check_pruning,
    freeze_unused,
)
from bayes_svdo.inference.compiled import CompiledObjective, wants_compilation
from bayes_svdo.inference.data_sites import check_scale
from bayes_svdo.inference.devices import Ranks, make_fabric, seed_of
from bayes_svdo.inference.elbo import TraceAnalyticKL_ELBO
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.objective import Objective
from bayes_svdo.inference.posterior import Posterior, local_parameters, named_apart
from bayes_svdo.inference.schedules import Schedule, as_lr_schedule, as_warmup
from bayes_svdo.inference.surroundings import denormals_flushed, new_tensors, random_state
from bayes_svdo.inference.threads import check_threads, threads
from bayes_svdo.inference.training import (
    Callback,
    EpochEnd,
    NonFiniteObjectiveError,
    TrainingRun,
    evaluate,
)
from bayes_svdo.models import BayesianNetwork

__all__ = ["Callback", "EpochEnd", "NonFiniteObjectiveError", "evaluate", "fit"]

_EVALUATION_BATCH = 1000


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
    devices: int | None = None,
    num_nodes: int = 1,
    precision: str = "32-true",
    threshold: float = 3.0,
    prune_while_training: bool = False,
    compile: bool | Literal["auto"] = "auto",
    num_threads: int | Literal["auto"] = "auto",
    callbacks: Sequence[Callback] = (),
    seed: int | None = None,
    progress: bool = True,
) -> Posterior:
    """Fit a guide to a model by SVI, with Adam.

    Minimises ``(E_q[-log p(y|x,w)] + kl_weight * KL[q‖p]) / num_data``. Model and guide are
    copied: what is passed in stays as it is, and what is learned is in the posterior that comes
    back. For a warm start pass the ``model`` and ``guide`` of an earlier posterior; a network's
    ``model`` alone starts from its means, with fresh variances.

    Args:
        model: A :class:`~bayes_svdo.models.BayesianNetwork`, or any Pyro model ``model(x, y)``
            whose point estimates, if any, are parameters of an ``nn.Module``.
        train: A pair of tensors ``(x, y)``, a Dataset or a DataLoader. Tensors live on the device
            if they fit, are shuffled there, and are checked before training; what a Dataset or a
            DataLoader gives is checked as it comes, in the first epoch.
        guide: An unfitted or an earlier guide; ``AdditiveNoiseGuide(model)`` if None.
        elbo: The objective; ``TraceAnalyticKL_ELBO()`` if None. Its own ``kl_weight`` multiplies
            the warm-up's.
        epochs: Passes over the data.
        batch_size: Data points per step and device (100 if None); a DataLoader has its own.
        lr: Adam's learning rate for means and point estimates.
        sigma_lr: Learning rate of ``log_sigma2``; ``lr`` if None. Adam moves by at most this per
            step, so a way from -10 to -3 takes at least ``7 / sigma_lr`` steps.
        lr_schedule: Factor on both rates; constant for half of training, then linear to 0, if None.
        kl_warmup: Weight of the KL: fractions of training between which it rises from 0 to 1, or a
            function of the fraction of steps done.
        validation: Data as ``train``; the pruned mean network is evaluated on it every epoch.
        device: ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        devices: Processes on this machine, one per device. More than one starts the script again
            for each of them, as Lightning Fabric does (not from a notebook), unless ``torchrun`` or
            ``fabric run`` has; None: as many as those have started, else one.
        num_nodes: Machines; on each of them the script has been started.
        precision: ``"32-true"``, ``"64-true"``, ``"bf16-mixed"`` or, on CUDA, ``"16-mixed"``.
        threshold: A weight counts as pruned where ``log alpha >= threshold``.
        prune_while_training: Zero such weights for good, at the end of every epoch from the one in
            which the KL first has full weight: the ``train_clip`` of the paper's code. If the
            warm-up ends with training, that is the last.
        compile: Trace and compile the objective, which takes up to a minute and then a step about
            half its time. On a CPU it draws the same random numbers, on CUDA others. ``"auto"``:
            where there is a compiler, for runs of 10,000 steps or more; what cannot be compiled is
            said, and runs as it is. What else the model reads, such as an attribute that a callback
            changes, is a constant then.
        num_threads: Threads of a CPU, for this run alone. ``"auto"``: as many of torch's own
            (``torch.get_num_threads()``) as the matrix products of a batch have work for; a small
            network takes longer with all cores of a large machine than with a few.
        callbacks: Called after every epoch with an :class:`EpochEnd`, on every device's process;
            one that returns ``True`` ends training.
        seed: Makes the run reproducible, given the network's initial weights
            (``torch.manual_seed`` before it is made), and leaves the global random state as it was.
            None continues the global stream.
        progress: Show a progress bar.

    Returns:
        The posterior, on the device it was trained on. Ctrl-C ends training early with a warning
        and the posterior so far.

    Raises:
        TypeError, ValueError: An argument, or the data, cannot be used; named before any training.
            What a DataLoader does not tell is compared with ``num_data`` after the first epoch.
        NonFiniteObjectiveError: The objective, or a parameter, became NaN or infinite.
        UntraceableError: The objective cannot be compiled, with ``compile=True``.
    """
    epochs, seed = check_count("epochs", epochs, least=0), check_seed(seed)
    rates = check_rate("lr", lr), check_rate("sigma_lr", lr if sigma_lr is None else sigma_lr)
    warmup, callbacks = as_warmup(kl_warmup), check_functions("callbacks", callbacks)
    for callback in callbacks:
        check_takes("a callback", callback, "the EpochEnd")
    lr_schedule, thread_count = as_lr_schedule(lr_schedule), check_threads(num_threads)
    if elbo is not None and not isinstance(elbo, TraceAnalyticKL_ELBO):
        raise TypeError(
            f"elbo must be a TraceAnalyticKL_ELBO, but is {elbo!r}.\n"
            "  Try pyro.infer.SVI, which takes any ELBO."
        )
    fabric = make_fabric(device, devices, num_nodes, precision)
    where, ranks = fabric.device, Ranks(fabric)
    dtype = torch.float64 if precision == "64-true" else None
    known = model.num_data if isinstance(model, BayesianNetwork) else None
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if ranks.count > 1:  # the same order of the data everywhere, and noise of their own
            order = ranks.agree(seed if seed is not None else int(torch.randint(2**62, ())))
            seed = seed_of(order, ranks.rank)
        stack.enter_context(random_state(seed, where))
        stack.enter_context(local_parameters())
        stack.enter_context(denormals_flushed(where))
        batches = make_batches(train, batch_size, where, "train", dtype=dtype, num_data=known)
        first = batches.first()
        check_batch(first, "train", 1)
        check_model(model, first)
        model, guide = _own_copies(model, guide, first, where, dtype)
        elbo = elbo or TraceAnalyticKL_ELBO()
        posterior = Posterior(model, guide, threshold=threshold, drawn=elbo.drawn)
        num_data = model.num_data if isinstance(model, BayesianNetwork) else batches.num_data
        objective = Objective(model, guide, elbo, scale=1 / (num_data or 1))
        if ranks.count > 1:
            batches.share(ranks, seed_of(order, ranks.count))  # a stream that no rank has
            freeze_unused(objective, first)
        compiled = wants_compilation(
            compile,
            device=where,
            precision=precision,
            steps=epochs * len(batches),
        )
        check = BatchCheck(posterior, batches, first, "train")
        check_last_batch(posterior, batches, first)
        if prune_while_training:
            check_pruning(guide)
        held_out = _held_out(validation, posterior, where, dtype)
        if not isinstance(model, BayesianNetwork):
            check_scale(model, guide, first, batches.num_data)
            check_parameters(objective, first)
        stack.enter_context(threads(thread_count, where, lambda: objective.preview(*first)))
        run = TrainingRun(
            fabric=fabric,
            ranks=ranks,
            posterior=posterior,
            objective=(
                CompiledObjective(objective, required=compile is True) if compiled else objective
            ),
            batches=batches,
            check=check if isinstance(batches, LoaderBatches) else None,
            validation=held_out,
            epochs=epochs,
            rates=rates,
            lr_schedule=lr_schedule,
            kl_warmup=warmup,
            prune_while_training=prune_while_training,
            callbacks=callbacks,
        )
        run.train(progress)
        if isinstance(model, BayesianNetwork):
            model.start_from(guide.median())  # a new guide for it goes on from here
    return posterior


def _own_copies(
    model: Callable[..., Any],
    guide: AdditiveNoiseGuide | None,
    batch: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype | None,
) -> tuple[Callable[..., Any], AdditiveNoiseGuide]:
    """Model and guide as copies of the run's own, on its device, the guide set up."""
    if guide is not None and not isinstance(guide, AdditiveNoiseGuide):
        raise TypeError(
            f"guide must be an AdditiveNoiseGuide, but is a {type(guide).__name__}.\n"
            "  Try pyro.infer.SVI with TraceAnalyticKL_ELBO, which takes any guide."
        )
    if isinstance(model, nn.Module):
        model = deepcopy(model).to(device, dtype)
    guide = AdditiveNoiseGuide(model) if guide is None else guide.copy_for(model)
    if guide.prototype_trace is None:
        with new_tensors(device, dtype):
            guide(*batch)
    check_guide(model, guide)
    named_apart(model, guide)
    return model, guide.to(device, dtype)


def _held_out(
    validation: Data | None, posterior: Posterior, device: torch.device, dtype: torch.dtype | None
) -> Batches | None:
    """Validation data, all of it checked."""
    if validation is None:
        return None
    if not isinstance(posterior.model, BayesianNetwork):
        raise TypeError(
            "validation needs a BayesianNetwork, but the model is a hand-written Pyro model.\n"
            "  Try a callback that evaluates it with pyro.infer.Predictive."
        )
    batches = make_batches(validation, None, device, "validation", shuffle=False, dtype=dtype)
    check = BatchCheck(posterior, batches, batches.first(), "validation")
    if isinstance(batches, TensorBatches):
        batches.batch_size = _EVALUATION_BATCH
    else:
        for number, batch in enumerate(batches, start=1):
            check(batch, number)
    return batches
