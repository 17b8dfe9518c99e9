"""fit: what goes in, what comes out, and what it leaves as it was."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bayes_svdo.distributions import LogUniform
from bayes_svdo.inference import (
    AdditiveNoiseGuide,
    EpochEnd,
    Posterior,
    TraceAnalyticKL_ELBO,
    fit,
)
from bayes_svdo.models import BayesianNetwork, Categorical, Gaussian

N = 60
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def classifier(num_data: int = N) -> BayesianNetwork:
    return BayesianNetwork(make_net(), Categorical(), num_data=num_data)


def quick(model: Any = None, train: Any = (X, Y), **kwargs: Any) -> Posterior:
    """A short run; whatever is given counts."""
    settings = {"epochs": 2, "batch_size": 20, "lr": 0.01, "seed": 0, "progress": False}
    if isinstance(train, DataLoader):
        del settings["batch_size"]
    return fit(classifier() if model is None else model, train, **{**settings, **kwargs})


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# --- it learns ----------------------------------------------------------------------------------


def test_a_classifier_learns_and_gets_sparse() -> None:
    """A smoke test with a seed of its own: accuracy from a third to nine tenths."""
    posterior = quick(epochs=100, lr=0.03, kl_warmup=(0.2, 0.5))
    assert posterior.history[0]["accuracy"] < 0.7
    assert posterior.history[-1]["accuracy"] > 0.9
    assert posterior.history[-1]["compression"] > 1.5
    pruned = posterior.prune()
    assert (pruned(X).argmax(-1) == Y).float().mean() > 0.9


# A support is recovered where the KL is weighed by log N, as in the BIC.
TRUE = torch.tensor([3.0, 0.0, 0.0, -2.0, 0.0, 0.0, 0.0, 1.0])
X_SPARSE = torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
Y_SPARSE = X_SPARSE @ TRUE + 0.5 * torch.randn(200, generator=torch.Generator().manual_seed(3))


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", LogUniform().expand([8]).to_event(1))
    with pyro.plate("data", 200, subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)
    return w


class Regression(PyroModule):
    """The same with a learned intercept and scale."""

    def __init__(self) -> None:
        super().__init__("regression")
        self.w = PyroSample(LogUniform().expand([8]).to_event(1))
        self.intercept = nn.Parameter(torch.tensor(1.0))
        self.scale = PyroParam(torch.tensor(1.0), dist.constraints.positive)

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        mean = x @ self.w + self.intercept
        with pyro.plate("data", 200, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal(mean, self.scale), obs=y)


@pytest.mark.parametrize("model", [regression, Regression()], ids=["function", "PyroModule"])
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_hand_written_model_recovers_the_support(model: Any, precision: str) -> None:
    posterior = quick(
        model,
        (X_SPARSE, Y_SPARSE),
        elbo=TraceAnalyticKL_ELBO(kl_weight=math.log(200)),
        epochs=250,
        batch_size=200,
        lr=0.05,
        kl_warmup=(0.1, 0.3),
        precision=precision,
    )
    (site,) = posterior.guide.sites
    relevant = posterior.log_alpha()[site] < posterior.threshold
    assert torch.equal(relevant, TRUE != 0)
    means = posterior.means()[site]
    assert means.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    torch.testing.assert_close(means.float(), TRUE, atol=0.15, rtol=0)  # 4 se of a coefficient
    assert posterior.sparsity().nonzero == 3
    if isinstance(model, Regression):
        assert float(model.scale.detach()) == 1.0
        assert float(posterior.model.scale.detach()) == pytest.approx(0.5, abs=0.1)  # type: ignore[attr-defined]


# --- what comes out -----------------------------------------------------------------------------


def test_history_has_the_documented_columns() -> None:
    posterior = quick(epochs=3, validation=(X[:10], Y[:10]))
    assert posterior.history.columns == [
        "epoch",
        "step",
        "nll",
        "kl",
        "objective",
        "kl_weight",
        "lr",
        "accuracy",
        "kl/0.weight",
        "kl/2.weight",
        "sparsity/0.weight",
        "sparsity/2.weight",
        "nonzero",
        "compression",
        "validation_accuracy",
        "validation_nll",
        "seconds",
    ]
    assert posterior.history.column("epoch") == [1, 2, 3]
    assert posterior.history.column("step") == [3, 6, 9]
    for row in posterior.history:
        assert row["kl"] == pytest.approx(row["kl/0.weight"] + row["kl/2.weight"], rel=1e-6)
        table = posterior.sparsity()
        assert row["compression"] == pytest.approx(table.weights / row["nonzero"])
    last, table = posterior.history[-1], posterior.sparsity()
    assert last["nonzero"] == table.nonzero
    assert last["sparsity/0.weight"] == pytest.approx(table["0.weight"].percent)


def test_history_holds_means_over_the_steps_of_the_epoch() -> None:
    """With no noise, no learning and the KL at half weight all can be computed by hand."""
    model = classifier()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-40.0)
    row = quick(
        model,
        guide=guide,
        epochs=1,
        lr=1e-30,
        lr_schedule=lambda progress: 1.0,
        kl_warmup=lambda progress: 0.5,
        validation=(X[:15], Y[:15]),
    ).history[0]
    with torch.no_grad():
        output = model.net(X)
        nll = float(nn.functional.cross_entropy(output, Y))
        kl = sum(float(LogUniform().kl_from(v).sum()) for v in guide.log_alpha().values())
        held_out = nn.functional.cross_entropy(output[:15], Y[:15])
    right = (output.argmax(-1) == Y).float()
    assert row["nll"] == pytest.approx(nll, rel=1e-5)
    assert row["kl"] == pytest.approx(kl, rel=1e-5)
    assert row["objective"] == pytest.approx(nll + 0.5 * kl / N, rel=1e-5)
    assert row["accuracy"] == pytest.approx(float(right.mean()), rel=1e-6)
    assert row["validation_nll"] == pytest.approx(float(held_out), rel=1e-5)
    assert row["validation_accuracy"] == pytest.approx(float(right[:15].mean()), rel=1e-6)
    assert row["kl_weight"] == 0.5
    assert row["lr"] == 1e-30
    assert row["seconds"] > 0


def test_regression_has_a_root_mean_squared_error() -> None:
    model = BayesianNetwork(nn.Linear(4, 1), Gaussian(), num_data=N)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-40.0)
    y = X[:, :1]
    for elbo in (
        TraceAnalyticKL_ELBO(),
        TraceAnalyticKL_ELBO(num_particles=2),
        TraceAnalyticKL_ELBO(num_particles=2, vectorize_particles=True),
    ):
        posterior = quick(model, (X, y), guide=guide, elbo=elbo, epochs=1, lr=1e-30)
        expected = (model.net(X) - y).square().mean().sqrt()
        assert posterior.history[0]["rmse"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_posterior_is_of_the_model_in_evaluation_mode() -> None:
    posterior = quick(threshold=2.0)
    assert posterior.threshold == 2.0
    assert posterior.stopped_because == "all 2 epochs were done"
    assert isinstance(posterior.model, BayesianNetwork)
    assert not posterior.model.training
    assert "0.weight, 2.weight" in repr(posterior)


def test_no_epochs_give_the_posterior_that_went_in() -> None:
    model = classifier()
    posterior = quick(model, epochs=0)
    assert len(posterior.history) == 0
    assert_same_state(state(posterior.model), state(model))  # type: ignore[arg-type]
    torch.testing.assert_close(posterior.output(X, math.inf), model.net(X).detach())


# --- what stays as it was -----------------------------------------------------------------------


def test_what_is_passed_in_stays_as_it_is() -> None:
    net = make_net()
    model = BayesianNetwork(net, Categorical(), num_data=N)
    guide = AdditiveNoiseGuide(model)
    before = state(net), state(model), state(guide)
    posterior = quick(model, guide=guide, precision="64-true", prune_while_training=True)
    assert_same_state(state(net), before[0])
    assert_same_state(state(model), before[1])
    assert_same_state(state(guide), before[2])
    assert model.training
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))
    assert not torch.equal(posterior.guide.median()["0.weight"].float(), net[0].weight)


def test_an_unfitted_guide_of_a_hand_written_model_stays_unfitted() -> None:
    guide = AdditiveNoiseGuide(regression, init_log_sigma2=-6.0, init={"w": TRUE})
    posterior = quick(regression, (X_SPARSE, Y_SPARSE), guide=guide, epochs=0)
    assert guide.sites == ()
    assert torch.equal(posterior.guide.median()["w"], TRUE)
    assert torch.equal(posterior.guide.parameters_of("w")[1], torch.full((8,), -6.0))


def test_a_seed_makes_a_run_reproducible_and_takes_no_global_random_numbers() -> None:
    torch.manual_seed(5)
    first = quick()
    before = torch.get_rng_state()
    second = quick()
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(state(first.guide), state(second.guide))
    assert_same_state(state(first.model), state(second.model))  # type: ignore[arg-type]
    for one, other in zip(first.history, second.history, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    other_seed = quick(seed=1)
    assert not torch.equal(first.guide.median()["0.weight"], other_seed.guide.median()["0.weight"])


def test_a_seed_makes_runs_with_a_loader_and_a_reused_objective_reproducible() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    torch.manual_seed(6)
    model = BayesianNetwork(Tied(), Categorical(), num_data=N)
    elbo = TraceAnalyticKL_ELBO()
    loader = DataLoader(TensorDataset(X, Y), batch_size=20, shuffle=True)
    first, second = (quick(model, loader, elbo=elbo) for _ in range(2))
    assert_same_state(state(first.guide), state(second.guide))


def test_without_a_seed_the_global_stream_goes_on() -> None:
    model = classifier()
    torch.manual_seed(7)
    first = quick(model, seed=None)
    second = quick(model, seed=None)
    torch.manual_seed(7)
    again = quick(model, seed=None)
    assert_same_state(state(first.guide), state(again.guide))
    assert not torch.equal(first.guide.median()["0.weight"], second.guide.median()["0.weight"])


def test_pyros_global_parameters_are_left_alone() -> None:
    pyro.param("mine", torch.tensor(1.0))
    quick()
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_global_settings_are_as_before() -> None:
    before = pyro.settings.get()
    quick(precision="64-true", callbacks=[lambda end: True])
    assert pyro.settings.get() == before
    assert torch.get_default_dtype() == torch.float32
    assert bool(torch.tensor(1e-40) * 1.0)  # denormals are numbers again


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_run_needs_no_gradients_around_it(mode: Any) -> None:
    expected = quick()
    with mode():
        posterior = quick()
    assert_same_state(state(posterior.guide), state(expected.guide))


def test_a_quiet_run_says_nothing(caplog: Any, capfd: Any) -> None:
    with caplog.at_level("INFO"):
        quick(precision="bf16-mixed", epochs=1)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


# --- warm starts --------------------------------------------------------------------------------


def test_an_earlier_posterior_is_a_warm_start() -> None:
    first = quick(epochs=60, lr=0.03, kl_warmup=(0.2, 0.5), prune_while_training=True)
    again = quick(first.model, guide=first.guide, epochs=0)
    assert_same_state(state(again.guide), state(first.guide))
    on = quick(first.model, guide=first.guide, epochs=1, kl_warmup=(0.0, 0.0))
    assert on.history[0]["nll"] < first.history[0]["nll"] / 2
    gone = first.log_alpha()["0.weight"] == math.inf
    assert gone.any()
    assert (on.log_alpha()["0.weight"][gone] == math.inf).all()


def test_the_model_of_an_earlier_posterior_alone_starts_from_its_means() -> None:
    first = quick(epochs=60, lr=0.03)
    again = quick(first.model, epochs=0)
    for name, mean in first.guide.median().items():
        assert torch.equal(again.guide.median()[name], mean)
        assert torch.equal(AdditiveNoiseGuide(first.model).median()[name], mean)
        assert not torch.equal(first.model.own_weights()[name], mean)  # type: ignore[attr-defined]
    torch.testing.assert_close(again.output(X, math.inf), first.output(X, math.inf))


def test_sites_that_the_objective_draws_are_drawn_in_local_predictions() -> None:
    elbo = TraceAnalyticKL_ELBO(drawn="0.weight")
    model = classifier()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-1.0)
    posterior = quick(model, guide=guide, elbo=elbo, epochs=0)
    assert posterior.drawn == {"0.weight"}
    same = X[:1].repeat(8, 1)
    hidden: list[Tensor] = []
    posterior.model.net[0].register_forward_hook(  # type: ignore[attr-defined]
        lambda module, x, y: hidden.append(y)
    )
    posterior.predictive(same, 1, method="local")
    assert torch.allclose(hidden[-1], hidden[-1][:1].expand(8, 8))  # one weight for all rows
    posterior.drawn = frozenset()
    posterior.predictive(same, 1, method="local")
    assert not torch.allclose(hidden[-1], hidden[-1][:1].expand(8, 8))
    with pytest.raises(ValueError, match=r'drawn names "0.weigth".*Did you mean "0.weight"'):
        quick(elbo=TraceAnalyticKL_ELBO(drawn=["0.weigth"]))


def test_the_objective_of_an_epoch_has_the_kl_weight_of_each_step() -> None:
    """The row's own is that of the last step, so its formula holds where that is constant."""
    settings = {"epochs": 4, "lr": 1e-30, "kl_warmup": (0.0, 0.5), "seed": 0}
    guide = AdditiveNoiseGuide(classifier(), init_log_sigma2=-40.0)  # terms that stay as they are
    history = quick(guide=guide, **settings).history
    for epoch, row in enumerate(history):
        weights = [min((3 * epoch + step) / 6, 1.0) for step in range(3)]
        mean = sum(weights) / 3
        assert row["kl_weight"] == pytest.approx(weights[-1])
        assert row["objective"] == pytest.approx(row["nll"] + mean * row["kl"] / N, rel=1e-5)
    assert history[0]["kl_weight"] > 1.5 * mean_weight(history[0])
    assert history[-1]["kl_weight"] == pytest.approx(mean_weight(history[-1]), rel=1e-5)


def mean_weight(row: dict[str, float]) -> float:
    return (row["objective"] - row["nll"]) * N / row["kl"]


def test_a_pretrained_network_is_a_warm_start() -> None:
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), Y).backward()
        optimizer.step()
    model = BayesianNetwork(net, Categorical(), num_data=N)
    assert quick(model, epochs=1, lr=1e-4).history[0]["accuracy"] > 0.95


# --- where data come from -----------------------------------------------------------------------


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


@pytest.mark.parametrize(
    "train",
    [
        (X, Y),
        (X.numpy(), Y.numpy()),
        TensorDataset(X, Y),
        Pairs(),
        DataLoader(Pairs(), batch_size=25, shuffle=True),
        DataLoader(TensorDataset(X, Y), batch_size=25),
    ],
    ids=["tensors", "arrays", "TensorDataset", "Dataset", "DataLoader", "in order"],
)
def test_any_source_of_data_trains(train: Any) -> None:
    """Batches of 25, 25 and 10: each stands for all 60 points."""
    kwargs = {} if isinstance(train, DataLoader) else {"batch_size": 25}
    posterior = quick(train=train, epochs=20, lr=0.05, kl_warmup=lambda progress: 0.0, **kwargs)
    assert posterior.history[-1]["step"] == 60
    assert posterior.history[-1]["accuracy"] > 0.8
    assert posterior.history[-1]["nll"] < 0.6


def test_accuracy_is_over_the_points_that_were_seen() -> None:
    train = DataLoader(TensorDataset(X, Y), batch_size=25, drop_last=True)
    model = classifier()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-40.0)
    row = quick(model, train, guide=guide, epochs=1, lr=1e-30).history[0]
    right = (model.net(X[:50]).argmax(-1) == Y[:50]).float().mean()
    assert row["accuracy"] == pytest.approx(float(right), rel=1e-6)


def test_several_inputs_go_to_a_network_that_takes_them() -> None:
    net = nn.Bilinear(4, 4, 3)
    model = BayesianNetwork(net, Categorical(), num_data=N)
    posterior = quick(model, ((X, X.flip(1)), Y), validation=((X, X), Y))
    assert posterior.predict((X, X), 2).shape == (2, N, 3)


def test_validation_comes_from_any_source_of_its_own() -> None:
    for validation in ((X[:7], Y[:7]), TensorDataset(X[:7], Y[:7]), DataLoader(Pairs())):
        posterior = quick(epochs=1, validation=validation)
        n = len(validation) if isinstance(validation, DataLoader) else 7
        right = (posterior.output(X[:n]).argmax(-1) == Y[:n]).float().mean()
        assert posterior.history[0]["validation_accuracy"] == pytest.approx(float(right), rel=1e-6)


def test_a_callback_sees_each_epoch_as_it_ends() -> None:
    seen: list[EpochEnd] = []
    posterior = quick(epochs=3, callbacks=[seen.append])
    assert [end.epoch for end in seen] == [1, 2, 3]
    assert [end.row for end in seen] == list(posterior.history)
    assert all(end.posterior is posterior for end in seen)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_precisions(precision: str) -> None:
    posterior = quick(epochs=20, lr=0.05, precision=precision, kl_warmup=lambda progress: 0.0)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    assert {p.dtype for p in posterior.guide.parameters()} == {dtype}
    assert posterior.output(X.to(dtype)).dtype == dtype
    assert posterior.history[-1]["accuracy"] > 0.8


@pytest.mark.parametrize("compile", [False, True])
def test_mixed_precision_rounds_no_targets(compile: bool, monkeypatch: Any) -> None:
    seen = set()

    class Watching(Gaussian):
        def forward(self, output: Tensor, y: Tensor | None, *rest: Any) -> None:
            if y is not None:
                seen.add(y.dtype)
            super().forward(output, y, *rest)

    monkeypatch.setattr("bayes_svdo.inference.graphs._compiled", lambda graph, *_: graph)
    model = BayesianNetwork(nn.Linear(X.shape[1], 1), Watching(), num_data=N)
    data = X, 1001.0 + X[:, :1]
    quick(model, data, epochs=1, precision="bf16-mixed", compile=compile)
    assert seen == {torch.float32}


def test_a_float64_network_is_trained_as_it_is() -> None:
    model = BayesianNetwork(make_net().double(), Categorical(), num_data=N)
    posterior = quick(model, (X.double(), Y), validation=(X.double(), Y))
    assert posterior.output(X.double()).dtype == torch.float64


@pytest.mark.parametrize("net_class", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_networks_train(net_class: Any) -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = net_class(2, 5, batch_first=True)
            self.readout = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.readout(self.rnn(x)[0][:, -1])

    torch.manual_seed(8)
    model = BayesianNetwork(Sequences(), Categorical(), num_data=N)
    posterior = quick(model, (X.reshape(N, 2, 2), Y), epochs=2)
    assert set(posterior.log_alpha()) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "readout.weight"}
    moved = posterior.guide.median()["rnn.weight_hh_l0"] - model.net.rnn.weight_hh_l0
    assert (moved != 0).all()


def test_batch_normalisation_learns_its_statistics_from_the_training_data_alone() -> None:
    torch.manual_seed(9)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    model = BayesianNetwork(net, Categorical(), num_data=N)
    posterior = quick(model, epochs=2, validation=(1000 * X, Y))
    batches = posterior.model.net[1].num_batches_tracked  # type: ignore[attr-defined]
    assert int(batches) == 6
    assert posterior.model.net[1].running_var.max() < 100  # type: ignore[attr-defined]
    assert int(model.net[1].num_batches_tracked) == 0


@pytest.mark.cuda
def test_a_run_on_a_gpu_is_reproducible_and_learns() -> None:
    runs = [quick(epochs=60, lr=0.03, device="cuda", kl_warmup=(0.2, 0.5)) for _ in range(2)]
    assert runs[0].device.type == "cuda"
    assert_same_state(state(runs[0].guide), state(runs[1].guide))
    assert runs[0].history[-1]["accuracy"] > 0.8
    assert runs[0].predict(X).is_cuda


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "16-mixed"])
def test_precisions_on_a_gpu(precision: str) -> None:
    posterior = quick(epochs=60, lr=0.03, device="cuda", precision=precision, kl_warmup=(0.2, 0.5))
    assert posterior.history[-1]["accuracy"] > 0.8


@pytest.mark.cuda
@pytest.mark.parametrize("model", [regression, Regression()], ids=["function", "PyroModule"])
def test_a_hand_written_model_trains_on_a_gpu(model: Any) -> None:
    posterior = quick(model, (X_SPARSE, Y_SPARSE), device="cuda", epochs=2, batch_size=200)
    assert posterior.device.type == "cuda"


def test_a_frozen_point_estimate_stays_without_a_word() -> None:
    """Pyro would warn that it is not in its store; here warnings are errors."""
    model = classifier()
    model.net[0].bias.requires_grad_(False)
    posterior = quick(model)
    assert torch.equal(posterior.model.net[0].bias, model.net[0].bias)
    assert not torch.equal(posterior.model.net[2].bias, model.net[2].bias)
