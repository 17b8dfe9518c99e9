"""A posterior on disk is the posterior, or an error; never half of it."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_svdo.distributions import EmpiricalBayes, LogUniform
from bayes_svdo.inference import AdditiveNoiseGuide, History, Posterior, fit
from bayes_svdo.inference.checkpoints import CheckpointError
from bayes_svdo.models import (
    BayesianNetwork,
    Bernoulli,
    Categorical,
    Gaussian,
    build,
    dense,
    lenet_300_100,
    linear_regression,
)

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Own(nn.Module):
    """A network that the library cannot build."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)
        self.tail = nn.Linear(6, 3)
        self.tail.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) + self.tail(self.body(x))


def make(
    net: nn.Module | None = None,
    likelihood: Any = None,
    prior: Any = None,
    seed: int = 1,
    **kwargs: Any,
) -> Posterior:
    """A posterior with something of everything."""
    torch.manual_seed(seed)
    net = build("4-6-3", 4, 3) if net is None else net
    model = BayesianNetwork(net, likelihood or Categorical(), num_data=5, prior=prior)
    guide = AdditiveNoiseGuide(model, **{"init_log_sigma2": -1.0, **kwargs})
    posterior = Posterior(
        model.eval(),
        guide,
        history=History([{"epoch": 1, "nll": 0.5, "compression": math.inf, "kl": math.nan}]),
        threshold=2.5,
        stopped_because="interrupted after epoch 1 of 9",
    )
    guide.prune_(2.0)
    return posterior


def assert_same(one: Posterior, other: Posterior) -> None:
    for module, twin in ((one.guide, other.guide), (one.model, other.model)):
        state, expected = module.state_dict(), twin.state_dict()  # type: ignore[attr-defined]
        assert state.keys() == expected.keys()
        for name in state:
            assert state[name].dtype == expected[name].dtype
            assert torch.equal(state[name], expected[name]), name
    assert one.threshold == other.threshold
    assert one.stopped_because == other.stopped_because
    assert repr(list(one.history)) == repr(list(other.history))  # NaN is not equal to itself
    assert one.guide.sigma == other.guide.sigma
    assert one.guide.init_log_sigma2 == other.guide.init_log_sigma2
    assert repr(one.model.prior) == repr(other.model.prior)  # type: ignore[attr-defined]
    assert one.model.num_data == other.model.num_data  # type: ignore[attr-defined]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- models written by hand ---------------------------------------------------------------------


class Regression(PyroModule):
    """With a point estimate, an offset for each of 5 data points, and 2 of them in a batch."""

    def __init__(self) -> None:
        super().__init__("regression")
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w.slope", LogUniform().expand([4]).to_event(1))
        with pyro.plate("data", 5, subsample=torch.arange(len(x))):
            offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal((x * w).sum(-1) + offset, self.scale.abs()), obs=y)


def by_hand(model: Any, **kwargs: Any) -> Posterior:
    torch.manual_seed(3)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-1.0, **kwargs)
    guide(X[:2], torch.zeros(2))
    guide.prune_(6.0)
    return Posterior(model, guide, history=History([{"epoch": 1, "nll": 0.5}]), threshold=2.5)


@pytest.mark.parametrize("sigma", ["weight", "layer"])
def test_the_posterior_of_a_model_written_by_hand_comes_back(tmp_path: Path, sigma: Any) -> None:
    posterior = by_hand(Regression(), sigma=sigma)
    with torch.no_grad():
        posterior.model.scale.fill_(0.3)  # type: ignore[attr-defined]
    posterior.save(tmp_path / "run")
    model = Regression()
    loaded = Posterior.load(tmp_path / "run", model=model)
    assert loaded.guide.sites == posterior.guide.sites == ("w.slope", "offset")
    for name, value in posterior.guide.state_dict().items():
        assert torch.equal(loaded.guide.state_dict()[name], value), name
    assert loaded.guide.median()["offset"].shape == (5,)
    assert float(loaded.model.scale.detach()) == pytest.approx(0.3)  # type: ignore[attr-defined]
    assert float(model.scale.detach()) == 1.0
    assert list(loaded.history) == list(posterior.history)
    assert (loaded.threshold, loaded.guide.sigma) == (2.5, sigma)
    assert str(loaded.sparsity()) == str(posterior.sparsity())
    draws = []
    for each in (posterior, loaded):
        torch.manual_seed(4)
        predictive = Predictive(each.guide.model, guide=each.guide, num_samples=3)
        draws.append(predictive(X[:2])["y"])
    assert torch.equal(*draws)


def test_a_posterior_that_came_back_can_be_trained_on(tmp_path: Path) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
        with pyro.plate("data", 5, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    data = X.double(), X[:, 0].double()
    settings: dict[str, Any] = {"precision": "64-true", "device": "cpu", "progress": False}
    posterior = fit(model, data, epochs=1, **settings)
    posterior.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run", model=model)
    assert loaded.means()["w"].dtype == torch.float64
    on = fit(loaded.model, data, guide=loaded.guide, epochs=1, **settings)
    assert not torch.equal(on.means()["w"], posterior.means()["w"])


def test_a_model_written_by_hand_must_be_given(tmp_path: Path) -> None:
    by_hand(Regression()).save(tmp_path / "hand")
    make().save(tmp_path / "network")
    message = r"(?s)posterior of Regression, a Pyro model written by hand.*model=\.\.\."
    for given in ({}, {"net": nn.Linear(4, 1)}, {"model": 3}, {"model": make().model}):
        with pytest.raises(CheckpointError, match=message):
            Posterior.load(tmp_path / "hand", **given)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"(?s)holds a network.*net=\.\.\."):
        Posterior.load(tmp_path / "network", model=Regression())
    with pytest.raises(CheckpointError, match="does not fit"):
        Posterior.load(tmp_path / "hand", model=nn.Linear(4, 1))


# --- priors and likelihoods of your own ---------------------------------------------------------


class Mine(Categorical):
    """A likelihood of the user's."""


class TenTimes(LogUniform):
    """A prior of the user's, whose KL is not that of its base."""

    def kl_from(self, log_alpha: Tensor) -> Tensor:
        return 10 * super().kl_from(log_alpha)


class Shrinking(EmpiricalBayes):
    """Another."""


OWN: dict[str, dict[str, Any]] = {
    "Mine": {"likelihood": Mine()},
    "TenTimes": {"prior": TenTimes()},
    "Shrinking": {"prior": Shrinking()},
    "Normal": {"prior": dist.Normal(0.0, 2.0)},
}


@pytest.mark.parametrize("name", OWN)
def test_priors_and_likelihoods_of_your_own_come_back_with_the_model(
    tmp_path: Path, name: str
) -> None:
    posterior = make(**OWN[name])
    posterior.save(tmp_path / "run")
    part = "likelihood" if name == "Mine" else "prior"
    for given in ({}, {"net": build("4-6-3", 4, 3)}):
        with pytest.raises(CheckpointError, match=rf"(?s)whose {part} is a {name},.*model=\.\.\."):
            Posterior.load(tmp_path / "run", **given)  # type: ignore[arg-type]
    model = make(seed=2, **OWN[name]).model
    before = {key: value.clone() for key, value in model.state_dict().items()}  # type: ignore[attr-defined]
    loaded = Posterior.load(tmp_path / "run", model=model)
    assert_same(loaded, posterior)
    assert type(getattr(loaded.model, part)).__name__ == name
    assert torch.equal(loaded.output(X), posterior.output(X))
    after = model.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(after[key], value) for key, value in before.items())  # a copy was loaded
    with pytest.raises(CheckpointError, match=rf"has a {part} {name}\(\), but model has "):
        Posterior.load(tmp_path / "run", model=make().model)


def test_a_network_of_ours_comes_back_in_its_model(tmp_path: Path) -> None:
    posterior = make(Own(), Gaussian(noise="learned"), LogUniform("exact"))
    posterior.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run", model=posterior.model)
    assert_same(loaded, posterior)
    with pytest.raises(CheckpointError, match="both net and model"):
        Posterior.load(tmp_path / "run", net=Own(), model=posterior.model)
    message = r"has sites body\.0\.weight, head\.weight, but model has fc1\.weight, fc2\.weight"
    with pytest.raises(CheckpointError, match=message):
        Posterior.load(tmp_path / "run", model=make().model)


def test_what_is_drawn_and_where_to_start_come_back(tmp_path: Path) -> None:
    posterior = make()
    posterior.drawn = frozenset(["0.weight"])
    posterior.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run")
    assert loaded.drawn == {"0.weight"}
    for name, mean in posterior.guide.median().items():
        assert torch.equal(AdditiveNoiseGuide(loaded.model).median()[name], mean)


def test_which_sites_are_pruned_comes_back(tmp_path: Path) -> None:
    posterior = by_hand(Regression())
    assert posterior.guide.prunable_sites == ("w.slope",)
    posterior.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run", model=Regression())
    assert loaded.guide.prunable_sites == ("w.slope",)
    description = json.loads((tmp_path / "run" / "posterior.json").read_text())
    assert [site["prunable"] for site in description["sites"].values()] == [True, False]


# --- round trips --------------------------------------------------------------------------------


def test_a_network_by_name_comes_back_without_being_told(tmp_path: Path) -> None:
    posterior = make()
    assert posterior.save(tmp_path / "run") == tmp_path / "run"
    loaded = Posterior.load(tmp_path / "run")
    assert_same(loaded, posterior)
    assert torch.equal(loaded.output(X), posterior.output(X))
    assert not loaded.model.training  # type: ignore[attr-defined]


def test_a_network_of_your_own_comes_back_with_it(tmp_path: Path) -> None:
    torch.manual_seed(2)
    posterior = make(Own())
    posterior.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"(?s)network of your own class.*net=\.\.\."):
        Posterior.load(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run", net=Own())
    assert_same(loaded, posterior)
    assert torch.equal(loaded.output(X), posterior.output(X))


@pytest.mark.parametrize(
    "make_net",
    [lambda: dense((4, 6, 3)), lambda: lenet_300_100(4, 3), lambda: linear_regression(4, 3)],
)
def test_a_network_of_ours_comes_back_however_it_was_made(tmp_path: Path, make_net: Any) -> None:
    posterior = make(make_net())
    state = torch.get_rng_state()
    posterior.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(loaded, posterior)
    assert torch.equal(loaded.output(X), posterior.output(X))


@pytest.mark.parametrize("change", ["layer", "spec"])
def test_a_network_of_ours_that_was_changed_is_one_of_your_own(tmp_path: Path, change: str) -> None:
    net = dense((4, 6, 3))
    if change == "layer":
        net.append(nn.Tanh())
    else:
        net.spec = {"mine": 1}  # type: ignore[assignment]
    posterior = make(net)
    posterior.save(tmp_path / "run")
    with pytest.raises(CheckpointError, match="network of your own class"):
        Posterior.load(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run", net)
    assert torch.equal(loaded.output(X), posterior.output(X))


@pytest.mark.parametrize(
    "prior", [LogUniform("exact"), LogUniform("kingma2015", extrapolate=True), EmpiricalBayes()]
)
def test_priors_come_back(tmp_path: Path, prior: Any) -> None:
    posterior = make(prior=prior)
    posterior.save(tmp_path / "run")
    assert_same(Posterior.load(tmp_path / "run"), posterior)


@pytest.mark.parametrize(
    "likelihood",
    [Categorical(), Bernoulli(), Gaussian(0.3), Gaussian(0.3, noise="learned")],
    ids=lambda likelihood: type(likelihood).__name__,
)
def test_likelihoods_come_back(tmp_path: Path, likelihood: Any) -> None:
    posterior = make(likelihood=likelihood)
    posterior.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run")
    assert_same(loaded, posterior)
    assert type(loaded.model.likelihood) is type(likelihood)  # type: ignore[attr-defined]
    torch.testing.assert_close(loaded.predict(X), posterior.predict(X))


@pytest.mark.parametrize("sigma", ["weight", "unit", "layer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_and_shared_variances_come_back(tmp_path: Path, sigma: Any, dtype: Any) -> None:
    posterior = make(sigma=sigma)
    posterior.model.to(dtype)  # type: ignore[attr-defined]
    posterior.guide.to(dtype)
    posterior.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run")
    assert_same(loaded, posterior)
    assert loaded.output(X.to(dtype)).dtype == dtype


def test_thresholds_without_bound_come_back(tmp_path: Path) -> None:
    posterior = make()
    posterior.threshold = math.inf
    posterior.save(tmp_path / "run")
    assert Posterior.load(tmp_path / "run").threshold == math.inf


def test_a_loaded_posterior_can_be_saved_again(tmp_path: Path) -> None:
    make().save(tmp_path / "one")
    Posterior.load(tmp_path / "one").save(tmp_path / "two")
    assert_same(Posterior.load(tmp_path / "two"), Posterior.load(tmp_path / "one"))


def test_loading_takes_no_random_numbers(tmp_path: Path) -> None:
    make().save(tmp_path / "run")
    before = torch.get_rng_state()
    Posterior.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    posterior = make()
    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "dumps"), (pickle, "dump")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    posterior.save(tmp_path / "run")
    Posterior.load(tmp_path / "run")


def test_the_description_is_json_that_any_program_reads(tmp_path: Path) -> None:
    make().save(tmp_path / "run")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "run" / "posterior.json").read_text()
    description = json.loads(text, parse_constant=refuse)
    assert description["history"][0]["compression"] == "inf"
    assert description["network"] == {"name": "4-6-3", "in_features": 4, "out_features": 3}


# --- replacing ----------------------------------------------------------------------------------


def test_saving_again_replaces_the_posterior_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "run"
    make(seed=1).save(target)
    (target / "picture.png").write_bytes(b"")
    other = make(seed=2)
    other.save(target)
    assert_same(Posterior.load(target), other)
    assert len(files(target)) == 3
    assert "picture.png" in files(target)
    assert files(tmp_path) == {"run"}


def test_saving_the_same_again_is_no_trouble(tmp_path: Path) -> None:
    for _ in range(2):
        make().save(tmp_path / "run")
    assert len(files(tmp_path / "run")) == 2


def test_an_empty_folder_and_missing_parents_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make().save(tmp_path / "empty")
    make().save(str(tmp_path / "a" / "b"))
    assert Posterior.load(str(tmp_path / "a" / "b")).threshold == 2.5


def test_what_is_no_posterior_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(b"1")
    (tmp_path / "file").write_bytes(b"1")
    for name in ("photos", "file"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not a saved posterior"):
            make().save(tmp_path / name)
    assert files(tmp_path / "photos") == {"one.jpg"}


@pytest.mark.parametrize("call", [1, 2], ids=["tensors", "description"])
@pytest.mark.parametrize("function", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_in_the_middle_leaves_the_old_posterior_and_no_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int, error: BaseException
) -> None:
    target, old = tmp_path / "run", make(seed=1)
    old.save(target)
    calls = 0
    real: Callable[..., Any] = getattr(os, function)

    def crash(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, crash)
        with pytest.raises(type(error)):
            make(seed=2).save(target)
    assert_same(Posterior.load(target), old)
    assert not any(name.startswith(".") for name in files(target))
    assert files(tmp_path) == {"run"}
    new = make(seed=2)
    new.save(target)  # whatever the crash left is no trouble
    assert_same(Posterior.load(target), new)
    assert len(files(target)) == 2


def test_a_posterior_that_cannot_be_saved_leaves_nothing(tmp_path: Path) -> None:
    posterior = make()
    posterior.stopped_because = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="not JSON serializable"):
        posterior.save(tmp_path / "run")
    assert files(tmp_path) == set()


# --- what is refused ----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make().save(tmp_path / "run")


def tensors_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "posterior.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def cut_short(folder: Path) -> None:
    path = tensors_of(folder)
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(folder: Path) -> None:
    path = tensors_of(folder)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no description": (
        lambda folder: (folder / "posterior.json").unlink(),
        "run is not a saved posterior: it has no posterior.json",
    ),
    "no tensors": (
        lambda folder: tensors_of(folder).unlink(),
        r"is damaged: it has no file posterior-[0-9a-f]+\.safetensors",
    ),
    "tensors cut short": (cut_short, r"\.safetensors is damaged: its SHA-256"),
    "a bit of the tensors": (flip_a_bit, r"\.safetensors is damaged: its SHA-256"),
    "description cut short": (
        lambda folder: (folder / "posterior.json").write_text('{"format": 1, "ten'),
        r"posterior\.json is damaged",
    ),
    "description of binary": (
        lambda folder: (folder / "posterior.json").write_bytes(b"\xff\xfe\x00"),
        r"posterior\.json is damaged",
    ),
    "another description": (
        lambda folder: (folder / "posterior.json").write_text("[1, 2]"),
        r"posterior\.json does not describe a posterior",
    ),
    "another format": (
        lambda folder: rewrite(folder, lambda d: d.update(format=99)),
        "has format 99; this version reads 1",
    ),
    "a missing entry": (
        lambda folder: rewrite(folder, lambda d: d.pop("likelihood")),
        r"posterior\.json is damaged: KeyError\('likelihood'\)",
    ),
    "an unknown likelihood": (
        lambda folder: rewrite(folder, lambda d: d["likelihood"].update(name="Cauchy")),
        r"posterior\.json is damaged: KeyError\('Cauchy'\)",
    ),
    "a threshold in words": (
        lambda folder: rewrite(folder, lambda d: d.update(threshold="three")),
        r"posterior\.json is damaged, at \"threshold\": .*three",
    ),
    "no threshold": (
        lambda folder: rewrite(folder, lambda d: d.update(threshold=None)),
        r"posterior\.json is damaged, at \"threshold\": .*None",
    ),
    "half a data point": (
        lambda folder: rewrite(folder, lambda d: d.update(num_data=0.5)),
        r"posterior\.json is damaged, at \"num_data\": .*0\.5",
    ),
    "an unknown sigma": (
        lambda folder: rewrite(folder, lambda d: d["guide"].update(sigma="wieght")),
        r"posterior\.json is damaged, at \"guide\": .*wieght.*weight",
    ),
    "a variance in words": (
        lambda folder: rewrite(folder, lambda d: d["guide"].update(init_log_sigma2="-10")),
        r"posterior\.json is damaged, at \"guide\": init_log_sigma2 must .*'-10'",
    ),
    "a guide in words": (
        lambda folder: rewrite(folder, lambda d: d.update(guide="additive")),
        r"posterior\.json is damaged, at \"guide\": ",
    ),
    "an unknown network": (
        lambda folder: rewrite(folder, lambda d: d["network"].update(name="4-8-x")),
        r"posterior\.json is damaged, at \"network\": ",
    ),
    "history in words": (
        lambda folder: rewrite(folder, lambda d: d.update(history=["long ago"])),
        r"posterior\.json is damaged",
    ),
    "a file elsewhere": (
        lambda folder: rewrite(folder, lambda d: d.update(tensors="../../secret")),
        r"is damaged: it has no file \.\./\.\./secret",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_damaged_is_refused_by_name(
    saved: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        Posterior.load(saved)


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is not a saved posterior"):
        Posterior.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Linear(4, 3), r"has weights that net does not: fc1\.weight, fc2\.weight"),
        (build("4-7-3", 4, 3), r"(?s)does not fit the network:.*size mismatch"),
    ],
    ids=["other weights", "other sizes"],
)
def test_another_network_is_refused(saved: Path, net: nn.Module, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Posterior.load(saved, net=net)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (
            nn.Linear,
            r"(?s)net must be a torch\.nn\.Module, but is the class Linear.*Linear\(\.\.\.",
        ),
        ("4-8-3", r"net must be a torch\.nn\.Module, but is '4-8-3'"),
    ],
    ids=["class", "name"],
)
def test_what_is_no_network_is_refused(saved: Path, net: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Posterior.load(saved, net=net)


def test_the_class_of_a_model_is_refused(tmp_path: Path) -> None:
    by_hand(Regression()).save(tmp_path / "run")
    with pytest.raises(TypeError, match=r"(?s)model must be .*class Regression.*Regression\("):
        Posterior.load(tmp_path / "run", model=Regression)


def test_a_model_of_other_shapes_is_refused_when_it_runs(tmp_path: Path) -> None:
    """A function shows its sites no sooner."""

    def make_model(size: int, name: str = "w") -> Any:
        def model(x: Tensor, y: Tensor | None = None) -> None:
            w = pyro.sample(name, LogUniform().expand([size]).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w[:4], 1.0), obs=y)

        return model

    data, settings = (X, X[:, 0]), {"epochs": 1, "device": "cpu", "progress": False}
    fit(make_model(4), data, **settings).save(tmp_path / "run")  # type: ignore[arg-type]
    loaded = Posterior.load(tmp_path / "run", model=make_model(5))
    message = r'at site "w", guide has shape \(4,\) but the model has \(5,\)'
    with pytest.raises(ValueError, match=message):
        Predictive(loaded.guide.model, guide=loaded.guide, num_samples=3)(X)
    with pytest.raises(ValueError, match=message):
        fit(loaded.model, data, guide=loaded.guide, **settings)  # type: ignore[arg-type]
    other = make_model(4, "v")
    with pytest.raises(ValueError, match="guide is for the sites w, but the model has v"):
        fit(other, data, guide=Posterior.load(tmp_path / "run", model=other).guide, **settings)  # type: ignore[arg-type]


@pytest.mark.cuda
def test_a_posterior_of_a_gpu_comes_back_on_the_cpu(tmp_path: Path) -> None:
    posterior = make().to("cuda")
    posterior.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run")
    assert loaded.device.type == "cpu"
    assert_same(loaded, posterior.to("cpu"))
