"""The training loop: steps, schedules, what ends it, and what it will not carry on with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bayes_svdo.distributions import LogUniform
from bayes_svdo.inference import (
    AdditiveNoiseGuide,
    ConstantThenLinear,
    EpochEnd,
    KLWarmup,
    NonFiniteObjectiveError,
    Posterior,
    TraceAnalyticKL_ELBO,
    fit,
)
from bayes_svdo.inference.batches import make_batches
from bayes_svdo.inference.training import evaluate
from bayes_svdo.models import BayesianNetwork, Categorical

N = 40
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


def classifier() -> BayesianNetwork:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    return BayesianNetwork(net, Categorical(), num_data=N)


def quick(model: Any = None, train: Any = (X, Y), **kwargs: Any) -> Posterior:
    settings = {"epochs": 10, "batch_size": N, "lr": 0.01, "seed": 0, "progress": False}
    if isinstance(train, DataLoader):
        del settings["batch_size"]
    return fit(classifier() if model is None else model, train, **{**settings, **kwargs})


# --- steps --------------------------------------------------------------------------------------


def test_means_and_variances_have_learning_rates_of_their_own() -> None:
    """Adam's first step is its learning rate, whatever the gradient."""
    model = classifier()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-3.0)
    # In float64, so that a gradient is not lost beside Adam's 1e-8.
    posterior = quick(
        model, guide=guide, epochs=1, lr=0.01, sigma_lr=0.002, precision="64-true",
        kl_warmup=(0, 0),
    )  # fmt: skip
    for name in guide.sites:
        before, after = guide.double().parameters_of(name), posterior.guide.parameters_of(name)
        for rate, old, new in zip((0.01, 0.002), before, after, strict=True):
            step = (new - old).abs()
            torch.testing.assert_close(step, torch.full_like(step, rate), rtol=1e-3, atol=0)
    bias = posterior.model.net[2].bias - model.net[2].bias  # type: ignore[attr-defined]
    torch.testing.assert_close(bias.abs(), torch.full((2,), 0.01).double(), rtol=1e-3, atol=1e-8)


def test_variances_have_the_rate_of_the_means_unless_told() -> None:
    guide = AdditiveNoiseGuide(classifier(), init_log_sigma2=-3.0)
    posterior = quick(guide=guide, epochs=1, lr=0.01, kl_warmup=(0, 0))
    step = (posterior.guide.parameters_of("0.weight")[1] + 3.0).abs()
    torch.testing.assert_close(step, torch.full_like(step, 0.01), rtol=1e-3, atol=0)


def test_kl_weight_follows_its_schedule() -> None:
    posterior = quick(kl_warmup=(0.2, 0.6))
    expected = [KLWarmup(0.2, 0.6)(epoch / 10) for epoch in range(10)]
    assert posterior.history.column("kl_weight") == pytest.approx(expected)
    assert expected[0] == 0.0
    assert expected[-1] == 1.0


def test_kl_weight_of_the_objective_multiplies_the_schedules() -> None:
    weight = torch.tensor(1.0)
    elbo = TraceAnalyticKL_ELBO(kl_weight=weight)

    def halve(end: EpochEnd) -> None:
        weight.mul_(0.5)

    posterior = quick(epochs=3, elbo=elbo, kl_warmup=lambda progress: 3.0, callbacks=[halve])
    assert posterior.history.column("kl_weight") == [3.0, 1.5, 0.75]


def test_kl_without_weight_has_no_gradient() -> None:
    """At no weight and no noise the log variances have nothing to follow."""
    model = classifier()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-60.0)
    posterior = quick(model, guide=guide, kl_warmup=lambda progress: 0.0)
    assert torch.equal(posterior.guide.parameters_of("0.weight")[1], torch.full((5, 3), -60.0))


@pytest.mark.parametrize("schedule", [None, ConstantThenLinear(0.2), lambda progress: 1 - progress])
def test_learning_rate_follows_its_schedule(schedule: Any) -> None:
    posterior = quick(lr=0.01, lr_schedule=schedule)
    expected = [0.01 * (schedule or ConstantThenLinear())(epoch / 10) for epoch in range(10)]
    assert posterior.history.column("lr") == pytest.approx(expected)


@pytest.mark.parametrize("name", ["lr_schedule", "kl_warmup"])
def test_schedule_that_leaves_its_range_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must give numbers.*gives -0.5 at progress 0.5"):
        quick(**{name: lambda progress: 1.0 if progress < 0.5 else -0.5})


def test_schedules_count_steps_and_not_epochs() -> None:
    seen: list[float] = []

    def warmup(progress: float) -> float:
        seen.append(progress)
        return 1.0

    quick(epochs=2, batch_size=15, kl_warmup=warmup)
    assert seen == pytest.approx([step / 6 for step in range(6)])


def test_a_stream_that_gives_more_than_it_said_does_not_run_off_the_schedule() -> None:
    class Stream(IterableDataset[Any]):
        def __len__(self) -> int:
            return N

        def __iter__(self) -> Iterator[Any]:
            return iter([*zip(X, Y, strict=True), *zip(X, Y, strict=True)])

    seen: list[float] = []

    def schedule(progress: float) -> float:
        seen.append(progress)
        return 1.0 - progress

    with pytest.raises(ValueError, match="num_data=40, but train gave 80 data points"):
        quick(train=DataLoader(Stream(), batch_size=10), epochs=1, lr_schedule=schedule)
    assert seen == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1, 1, 1])


def test_steps_are_those_that_were_done_and_the_schedules_follow_them() -> None:
    class Sampler:
        def __len__(self) -> int:
            return 2  # it gives 4

        def __iter__(self) -> Iterator[Any]:
            return iter(torch.arange(N).split(10))

    loader = DataLoader(TensorDataset(X, Y), batch_sampler=Sampler())
    posterior = quick(train=loader, epochs=3, lr=1.0, lr_schedule=lambda p: 1 - p)
    assert posterior.history.column("step") == [4, 8, 12]
    # 2 of 6 steps, as was said; then 7 of 12, and 11 of 12.
    assert posterior.history.column("lr") == pytest.approx([1 - 2 / 6, 1 - 7 / 12, 1 - 11 / 12])


def test_a_step_counts_by_its_data_points() -> None:
    """With no noise and no learning the NLL is that of the whole data set."""
    model = classifier()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-40.0)
    row = quick(model, guide=guide, epochs=1, batch_size=33, lr=1e-30).history[0]
    nll = nn.functional.cross_entropy(model.net(X), Y)
    assert row["nll"] == pytest.approx(float(nll.detach()), rel=1e-5)


def test_a_stream_that_runs_dry_is_an_error() -> None:
    class Once(IterableDataset[Any]):
        def __init__(self) -> None:
            self.passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1  # the first is the look at a batch
            return iter(list(zip(X, Y, strict=True)) if self.passes <= 2 else [])

    with pytest.raises(ValueError, match="train gives no batches in epoch 2"):
        quick(train=DataLoader(Once(), batch_size=10))


# --- pruning ------------------------------------------------------------------------------------


def test_pruning_while_training_begins_at_full_weight_and_is_one_way() -> None:
    zeros: list[dict[str, Tensor]] = []

    def note(end: EpochEnd) -> None:
        zeros.append({name: v == math.inf for name, v in end.posterior.log_alpha().items()})

    posterior = quick(
        epochs=30, lr=0.05, kl_warmup=(0.3, 0.5), prune_while_training=True, callbacks=[note]
    )
    full = [weight >= 1.0 for weight in posterior.history.column("kl_weight")]
    for epoch, pruned in enumerate(zeros):
        count = sum(int(gone.sum()) for gone in pruned.values())
        assert (
            count
            == (posterior.sparsity().weights - posterior.history[epoch]["nonzero"]) * (full[epoch])
        )
        if epoch and full[epoch]:
            for name, gone in pruned.items():
                assert not (zeros[epoch - 1][name] & ~gone).any()
    assert zeros[-1]["0.weight"].any()
    for name, mean in posterior.guide.median().items():
        assert (mean[zeros[-1][name]] == 0).all()


def test_without_it_no_weight_is_pruned_for_good() -> None:
    posterior = quick(epochs=30, lr=0.05, kl_warmup=(0.3, 0.5))
    assert posterior.history[-1]["nonzero"] < posterior.sparsity().weights
    assert all((value < math.inf).all() for value in posterior.log_alpha().values())


def test_pruning_waits_where_the_kl_never_has_full_weight() -> None:
    posterior = quick(epochs=30, lr=0.05, kl_warmup=lambda progress: 0.9, prune_while_training=True)
    assert all((value < math.inf).all() for value in posterior.log_alpha().values())


def test_pruning_comes_last_where_the_warmup_ends_with_training() -> None:
    posterior = quick(
        epochs=3, lr=0.05, kl_warmup=(0.0, 1.0), prune_while_training=True, threshold=-4.0
    )
    gone = [(value == math.inf).any() for value in posterior.log_alpha().values()]
    assert any(gone)
    assert posterior.history[-1]["kl_weight"] < 1


# --- what ends it -------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [True, np.True_])
def test_a_callback_that_returns_true_ends_training(answer: Any) -> None:
    others: list[int] = []
    posterior = quick(
        callbacks=[lambda end: answer if end.epoch == 3 else None, lambda end: others.append(1)]
    )
    assert len(posterior.history) == 3
    assert len(others) == 3  # every callback sees every epoch
    assert posterior.stopped_because == "a callback ended training at epoch 3"


@pytest.mark.parametrize("answer", [False, None, 1, "yes", np.ones(2)])
def test_a_callback_that_returns_anything_else_does_not(answer: Any) -> None:
    assert len(quick(epochs=2, callbacks=[lambda end: answer]).history) == 2


@pytest.mark.parametrize("epoch", [1, 4])
def test_ctrl_c_ends_training_with_the_posterior_so_far(epoch: int) -> None:
    def interrupt(end: EpochEnd) -> None:
        if end.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match=f"interrupted after epoch {epoch} of 10") as caught:
        posterior = quick(callbacks=[interrupt])
    assert caught[0].filename == __file__
    assert len(posterior.history) == epoch
    assert posterior.stopped_because == f"interrupted after epoch {epoch} of 10"
    assert not posterior.model.training  # type: ignore[attr-defined]
    assert posterior.predict(X).shape == (N, 2)


def test_ctrl_c_gives_the_posterior_though_warnings_are_errors() -> None:
    def interrupt(end: EpochEnd) -> None:
        raise KeyboardInterrupt

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        posterior = quick(callbacks=[interrupt])
    assert posterior.stopped_because == "interrupted after epoch 1 of 10"
    assert not posterior.model.training  # type: ignore[attr-defined]


def test_ctrl_c_in_the_middle_of_an_epoch_is_the_same() -> None:
    calls = 0

    def warmup(progress: float) -> float:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return 1.0

    with pytest.warns(UserWarning, match="interrupted after epoch 1 of 10"):
        posterior = quick(batch_size=10, kl_warmup=warmup)
    assert len(posterior.history) == 1


def test_an_error_in_a_callback_is_the_callers() -> None:
    def broken(end: EpochEnd) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        quick(callbacks=[broken])
    assert bool(torch.tensor(1e-40) * 1.0)  # denormals are numbers again


# --- what it will not carry on with ---------------------------------------------------------------


class BreaksAt(nn.Module):
    """A hand-written model whose likelihood is no number from a step on."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step, self.calls = step, 0

    def forward(self, x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", LogUniform().expand([3]).to_event(1))
        self.calls += 1
        # The set-up of the guide, three checks and the count of its operations come before.
        bad = self.calls - 5 >= self.step
        mean = x @ w
        with pyro.plate("data", N, subsample=torch.arange(len(x))):
            pyro.sample("fine", dist.Normal(mean, 1.0), obs=y.float())
            pyro.sample("outcome", dist.Normal(mean * (math.nan if bad else 1), 1.0), obs=y.float())


@pytest.mark.parametrize(("step", "epoch", "within"), [(1, 1, 1), (3, 1, 3), (6, 2, 2), (8, 2, 4)])
def test_error_names_epoch_step_and_site_of_a_likelihood_that_breaks(
    step: int, epoch: int, within: int
) -> None:
    message = (
        rf'(?s)not finite at epoch {epoch}, step {within}, because of site "outcome"\..*'
        "log likelihood is not finite, though all parameters are"
    )
    with pytest.raises(NonFiniteObjectiveError, match=message) as caught:
        quick(BreaksAt(step), batch_size=10)
    assert (caught.value.epoch, caught.value.step) == (epoch, within)
    assert caught.value.sites == ("outcome",)
    assert isinstance(caught.value, FloatingPointError)


def test_a_step_too_large_is_found_out_before_the_posterior_is_handed_over() -> None:
    """The objective of the only step is finite; what the step leads to is not."""
    with pytest.raises(NonFiniteObjectiveError, match=r"(?s)epoch 1, step 1.*are not finite") as e:
        quick(epochs=1, lr=1e39)
    assert "0.weight" in e.value.sites


def test_a_step_too_large_is_named_with_its_site() -> None:
    with pytest.raises(NonFiniteObjectiveError, match=r"(?s)epoch 1, step 2.*Try a smaller lr"):
        quick(batch_size=20, lr=1e39)


def test_a_point_estimate_that_breaks_is_named() -> None:
    """Its gradient, 0 times inf, is no number where the objective is."""

    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.gain = nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.gain.abs().sqrt()

    torch.manual_seed(2)
    model = BayesianNetwork(Rooted(), Categorical(), num_data=N)
    message = (
        r'(?s)the posterior is not finite at epoch 1, step 1, because of site "net.gain".*'
        "1 of the 1 values of this point"
    )
    with pytest.raises(NonFiniteObjectiveError, match=message):
        quick(model, epochs=1)


def test_inputs_of_a_scale_that_overflows_are_the_likelihoods_fault() -> None:
    torch.manual_seed(3)
    model = BayesianNetwork(nn.Linear(3, 2), Categorical(), num_data=N)
    message = r'(?s)epoch 1, step 1, because of site "y".*log likelihood is not finite, though all'
    with pytest.raises(NonFiniteObjectiveError, match=message):
        quick(model, train=(X * 1e30, Y))


def test_kl_that_breaks_is_named() -> None:
    model = classifier()
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        guide.location_parameters()[1][0, 0] = math.nan
    with pytest.raises(NonFiniteObjectiveError) as caught:
        quick(model, guide=guide)
    assert "2.weight" in caught.value.sites
    assert 'At "2.weight", 1 of the 10 values of its loc are not finite' in str(caught.value)


# --- the rest -------------------------------------------------------------------------------------


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    quick(epochs=2, validation=(X, Y), progress=True)
    shown = capsys.readouterr().err
    for name in ("2/2", "nll=", "kl=", "accuracy=", "val_accuracy=", "compression="):
        assert name in shown
    quick(epochs=2)
    assert capsys.readouterr().err == ""


def test_evaluation_is_of_the_pruned_mean_network() -> None:
    posterior = quick(epochs=3)
    data = make_batches((X, Y), 7, torch.device("cpu"), "test", shuffle=False)
    everything = evaluate(posterior, data, threshold=math.inf, prefix="test")
    output = posterior.prune(math.inf)(X).detach()
    nll = nn.functional.cross_entropy(output, Y)
    assert everything["test_nll"] == pytest.approx(float(nll), rel=1e-5)
    assert everything["test_accuracy"] == pytest.approx(
        float((output.argmax(-1) == Y).float().mean()), rel=1e-6
    )
    nothing = evaluate(posterior, data, threshold=-math.inf)
    assert nothing["validation_nll"] != pytest.approx(float(nll), rel=1e-5)


def test_evaluation_finds_the_pruned_network_once(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = quick(epochs=1)
    calls = []
    log_alpha = posterior.guide.log_alpha
    monkeypatch.setattr(posterior.guide, "log_alpha", lambda: calls.append(1) or log_alpha())
    evaluate(posterior, make_batches((X, Y), 7, torch.device("cpu"), "test"))
    assert len(calls) == 1


def test_evaluation_on_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="test gives no batches"):
        evaluate(quick(epochs=0), [], prefix="test")  # type: ignore[arg-type]


@pytest.mark.cuda
def test_error_on_a_gpu_names_the_first_bad_step_though_it_is_read_later() -> None:
    with pytest.raises(NonFiniteObjectiveError) as caught:
        quick(BreaksAt(3), batch_size=10, device="cuda")
    assert (caught.value.epoch, caught.value.step) == (1, 3)
