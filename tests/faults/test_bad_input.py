"""Bad input is an error that names it, what was expected and what came, before training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from bayes_svdo.distributions import LogUniform
from bayes_svdo.inference import AdditiveNoiseGuide, fit
from bayes_svdo.inference.training import TrainingRun
from bayes_svdo.models import BayesianNetwork, Bernoulli, Categorical, Gaussian

N = 30
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(N) % 3
NAN, INF = float("nan"), float("inf")


def network(likelihood: Any = None, outputs: int = 3, num_data: int = N, **kwargs: Any) -> Any:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, outputs))
    return BayesianNetwork(net, likelihood or Categorical(), num_data, **kwargs)


def regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever gets past the checks fails here."""

    def train(self: TrainingRun, progress: bool) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(TrainingRun, "train", train)


def attempt(model: Any = None, train: Any = (X, Y), **kwargs: Any) -> None:
    fit(network() if model is None else model, train, progress=False, **kwargs)


def test_good_input_is_trained_on() -> None:
    with pytest.raises(AssertionError, match="training began"):
        attempt(validation=(X, Y))


def refused(error: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error, match=message):
        attempt(*args, **kwargs)


def with_value(tensor: Tensor, index: Any, value: float) -> Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


class Records(Dataset[Any]):
    """Pairs, one at a time."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


SOURCES = {
    "tensors": lambda x, y: (x, y),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "TensorDataset": TensorDataset,
    "Dataset": Records,
    "DataLoader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=10, shuffle=True),
    "loader of a Dataset": lambda x, y: DataLoader(Records(x, y), batch_size=10),
}


@pytest.fixture(params=SOURCES.values(), ids=SOURCES.keys())
def source(request: pytest.FixtureRequest) -> Any:
    return request.param


# --- wrong shapes -------------------------------------------------------------------------------


def test_inputs_that_the_network_cannot_take(source: Any) -> None:
    message = r"the network cannot take train x of shape \(\d+, 7\), dtype torch.float32.*7"
    refused(ValueError, message, train=source(torch.zeros(N, 7), Y))


def test_inputs_and_targets_of_different_number() -> None:
    message = r"as many inputs as targets.*x has shape \(30, 4\) and y has shape \(29,\)"
    refused(ValueError, message, train=(X, Y[:-1]))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "y", "message"),
    [
        (Categorical(), 3, Y[:, None], r"train y must have shape \(N,\).*has shape \(30, 1\)"),
        (Gaussian(), 1, X[:, 0], r"(?s)train y must have shape \(N, 1\).*\(30,\).*y\[:, None\]"),
        (Gaussian(), 2, X[:, :1], r"train y must have shape \(N, 2\).*has shape \(30, 1\)"),
        (Bernoulli(), 1, (Y > 0).float(), r"train y must have shape \(N, 1\).*shape \(30,\)"),
    ],
)
def test_targets_that_do_not_go_with_the_outputs(
    likelihood: Any, outputs: int, y: Tensor, message: str
) -> None:
    refused(ValueError, message, network(likelihood, outputs), (X, y))


def test_network_that_does_not_return_one_tensor() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return self.linear(x), x

    model = BayesianNetwork(Pair(), Categorical(), N)
    refused(TypeError, r"net must return one tensor, but returned a tuple.\n  Try", model)


# --- labels and dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "shown"), [(3, r": 3\."), (-1, r": -1\.")])
def test_labels_out_of_range(source: Any, label: int, shown: str) -> None:
    message = r"train y holds labels outside 0\.\.2, the classes of the network's 3 outputs" + shown
    message += r" The first is that of data point \d+, counted from 0\."
    y = with_value(Y, 2, label)
    refused(ValueError, message, train=source(X, y))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bool, torch.uint8])
def test_labels_of_another_dtype(dtype: torch.dtype) -> None:
    message = rf"(?s)train y holds class labels and must be int64, but its dtype is {dtype}.*long"
    refused(TypeError, message, train=(X, Y.to(dtype)))


@pytest.mark.parametrize(
    ("likelihood", "y", "message"),
    [
        (Gaussian(), Y[:, None], "train y must have the dtype of the network's output"),
        (Gaussian(), X[:, :1].double(), r"torch.float32, but has torch.float64"),
        (Bernoulli(), Y[:, None] > 0, "train y must have the dtype of the network's output"),
    ],
)
def test_targets_of_another_dtype(likelihood: Any, y: Tensor, message: str) -> None:
    refused(TypeError, message, network(likelihood, 1), (X, y))


def test_outcomes_that_are_neither_0_nor_1() -> None:
    y = with_value((Y > 0).float(), 4, 2.0)[:, None]
    refused(
        ValueError,
        r"train y must hold 0 and 1 only, but holds 2\.0",
        network(Bernoulli(), 1),
        (X, y),
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.float16])
def test_inputs_of_another_dtype(dtype: torch.dtype) -> None:
    message = (
        rf"(?s)the network cannot take train x of shape \(30, 4\), dtype {dtype}.*"
        r"Try torch.as_tensor\(x, dtype=torch.float32\)"
    )
    refused(ValueError, message, train=(X.to(dtype), Y))


def test_images_of_bytes() -> None:
    images = torch.zeros(N, 1, 4, 4, dtype=torch.uint8)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    model = BayesianNetwork(net, Categorical(), N)
    refused(
        ValueError,
        r"(?s)dtype torch.uint8.*Try torch.as_tensor\(x, dtype=torch.float32\)",
        model,
        (images, Y),
    )


# --- NaN, inf, nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_inputs_that_are_not_finite(source: Any, value: float) -> None:
    message = r"train x(, batch 1,)? holds NaN or inf, in 1 of \d+ data points, the first at index"
    refused(ValueError, message, train=source(with_value(X, (4, 1), value), Y))


@pytest.mark.parametrize("value", [NAN, INF])
def test_targets_that_are_not_finite(source: Any, value: float) -> None:
    message = r"train y(, batch 1,)? holds NaN or inf, in 1 of \d+ data points"
    train = source(X, with_value(X[:, :1], (4, 0), value))
    refused(ValueError, message, network(Gaussian(), 1), train)


def test_data_of_a_hand_written_model_that_are_not_finite(source: Any) -> None:
    refused(
        ValueError, "train x.* holds NaN or inf", regression, source(with_value(X, 4, NAN), X[:, 0])
    )


def test_validation_data_are_checked_likewise(source: Any) -> None:
    """All of them, though a loader gives them batch by batch."""
    bad = with_value(X, (25, 1), NAN)
    refused(ValueError, "validation x.* holds NaN or inf, in 1 of", validation=source(bad, Y))
    labels = with_value(Y, 25, 9)
    refused(ValueError, r"validation y holds labels.*: 9\.", validation=source(X, labels))
    wide = torch.zeros(N, 7)
    refused(ValueError, "the network cannot take validation x", validation=source(wide, Y))


def test_no_data(source: Any) -> None:
    if source is SOURCES["loader of a Dataset"]:
        loader = DataLoader(Records(X[:0], Y[:0]))
        refused(ValueError, "train is empty", train=loader)
    elif source is SOURCES["DataLoader"]:
        refused(ValueError, "train is empty", train=DataLoader(TensorDataset(X[:0], Y[:0])))
    else:
        refused(ValueError, "train is empty", train=source(X[:0], Y[:0]))


@pytest.mark.parametrize("train", [None, "mnist", 3, X, {"x": X}, (X,), (X, Y, Y), [1, 2]])
def test_what_is_no_data(train: Any) -> None:
    refused(TypeError, r"train (x )?must be", train=train)


def test_batches_that_are_no_pairs() -> None:
    message = r"train must give pairs \(x, y\), but gives 3 elements a batch"
    refused(TypeError, message, train=TensorDataset(X, Y, Y))


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [0, -5, 2.5, "20", True])
def test_batch_size_that_is_none(batch_size: Any) -> None:
    message = "batch_size must be an integer of at least 1, but is"
    refused(ValueError, message, batch_size=batch_size)


def test_batch_size_larger_than_the_data() -> None:
    refused(ValueError, "batch_size=31 is larger than train, which holds 30", batch_size=31)


@pytest.mark.parametrize("epochs", [-1, 1.5, None, "3", False])
def test_epochs_that_are_none(epochs: Any) -> None:
    refused(ValueError, "epochs must be an integer of at least 0, but is", epochs=epochs)


@pytest.mark.parametrize("num_data", [29, 31, 60_000])
def test_num_data_that_disagrees_with_the_data(source: Any, num_data: int) -> None:
    message = rf"(?s)num_data={num_data}, but train holds 30 data points.*num_data=30"
    refused(ValueError, message, network(num_data=num_data), source(X, Y))


@pytest.mark.parametrize("num_data", [0, -1, 1.5, None, "30"])
def test_num_data_that_is_none(num_data: Any) -> None:
    with pytest.raises(ValueError, match="num_data must be the number of data points"):
        network(num_data=num_data)


@pytest.mark.parametrize("name", ["lr", "sigma_lr"])
@pytest.mark.parametrize("rate", [0, -1e-3, NAN, INF, "fast"])
def test_learning_rate_that_is_none(name: str, rate: Any) -> None:
    refused(ValueError, f"{name} must be a positive number, but is", **{name: rate})


@pytest.mark.parametrize("threshold", [NAN, "3", None])
def test_threshold_that_is_none(threshold: Any) -> None:
    refused(ValueError, "threshold must be a number", threshold=threshold)


@pytest.mark.parametrize("kl_warmup", [(0.5, 0.1), (-1, 0.5), (0, 2), (NAN, 1)])
def test_warmup_out_of_order(kl_warmup: Any) -> None:
    refused(ValueError, "kl_warmup must be two fractions of training", kl_warmup=kl_warmup)


@pytest.mark.parametrize("kl_warmup", [0.1, (0.1,), (1, 2, 3), "linear"])
def test_warmup_that_is_none(kl_warmup: Any) -> None:
    refused(TypeError, "kl_warmup must be a function.*or a pair", kl_warmup=kl_warmup)


@pytest.mark.parametrize("seed", [1.5, "0"])
def test_seed_that_is_none(seed: Any) -> None:
    refused(ValueError, "seed must be an integer or None", seed=seed)


def test_seed_of_more_than_64_bits() -> None:
    refused(ValueError, "seed must be an integer of 64 bits, but is 100000", seed=10**20)


@pytest.mark.parametrize("callbacks", [print, [None], None, 3, ["print"]])
def test_callbacks_that_are_none(callbacks: Any) -> None:
    message = "callbacks must be a list of functions, but (is|holds)"
    refused(TypeError, message, callbacks=callbacks)


@pytest.mark.parametrize("callback", [lambda: None, lambda epoch, row, posterior: None])
def test_callbacks_of_other_arguments(callback: Any) -> None:
    message = "a callback must be a function of one argument, the EpochEnd, but <lambda> cannot"
    refused(TypeError, message, callbacks=[print, callback])


@pytest.mark.parametrize("lr_schedule", [0.5, "linear", (0.0, 1.0)])
def test_learning_rate_schedule_that_is_none(lr_schedule: Any) -> None:
    message = "lr_schedule must be a function of the fraction of training done, but is"
    refused(TypeError, message, lr_schedule=lr_schedule)


# --- batch normalisation ------------------------------------------------------------------------


def normalised(**kwargs: Any) -> Any:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **kwargs), nn.Linear(5, 3))
    return BayesianNetwork(net, Categorical(), N)


@pytest.mark.parametrize("form", ["tensors", "Dataset"])
def test_last_batch_of_one_with_batch_normalisation(form: str) -> None:
    message = r"(?s)last batch of train holds 1 data point.*batch normalisation.*batch_size=30"
    refused(ValueError, message, normalised(), SOURCES[form](X, Y), batch_size=29)
    with pytest.raises(ValueError, match="batch_size=2"):
        attempt(normalised(), SOURCES[form](X, Y), batch_size=1)


def test_last_batch_of_one_of_a_loader_with_batch_normalisation() -> None:
    train = DataLoader(Records(X, Y), batch_size=29, shuffle=True)
    refused(ValueError, "last batch of train holds 1 data point", normalised(), train)
    dropped = DataLoader(Records(X, Y), batch_size=29, drop_last=True)
    refused(AssertionError, "training began", normalised(), dropped)


def test_last_batch_of_one_that_is_no_trouble() -> None:
    """No batch normalisation; or one over the pixels of an image."""
    torch.manual_seed(1)
    images = X.reshape(N, 1, 2, 2)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    refused(AssertionError, "training began", batch_size=29)
    model = BayesianNetwork(net, Categorical(), N)
    refused(AssertionError, "training began", model, (images, Y), batch_size=29)
    assert int(model.net[1].num_batches_tracked) == 0


# --- names --------------------------------------------------------------------------------------


def test_unknown_precision() -> None:
    refused(ValueError, r'unknown precision "bf16".*Did you mean "bf16-mixed"\?', precision="bf16")


def test_precision_that_the_device_lacks() -> None:
    refused(ValueError, r'"16-mixed" needs a CUDA', precision="16-mixed", device="cpu")


def test_unknown_device() -> None:
    refused(ValueError, r'unknown device "cudda".*Did you mean "cuda"\?', device="cudda")


def test_unavailable_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(ValueError, 'device "cuda" is not available: this machine has 0', device="cuda")


@pytest.mark.parametrize("where", ["fc9.weight", lambda name, parameter: False, nn.LSTM])
def test_where_that_selects_nothing(where: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)selects none of the net's parameters.*0\.weight"):
        network(where=where)


def test_where_that_nearly_selects_something() -> None:
    with pytest.raises(ValueError, match=r'Did you mean "0.weight"\?'):
        network(where="0.wieght")


# --- model, guide and objective -----------------------------------------------------------------


def test_model_that_is_none() -> None:
    refused(TypeError, "model must be callable, but is a int", 3)


@pytest.mark.parametrize("net", [nn.Sequential(nn.Linear(4, 3)), nn.Bilinear(4, 1, 3)])
def test_network_that_is_no_model(net: nn.Module) -> None:
    train = (X, Y[:, None].float())
    message = r"(?s)(Sequential cannot|no latent site).*BayesianNetwork\(net, likelihood, num_data"
    with pytest.raises((TypeError, ValueError), match=message):
        attempt(net, train)


def test_function_that_does_not_take_a_batch() -> None:
    message = r"model must take the 2 elements of a batch, \(x, y\), but <lambda> cannot"
    refused(TypeError, message, lambda x: None)


def test_objective_that_is_not_ours() -> None:
    message = "(?s)elbo must be a TraceAnalyticKL_ELBO, but is <pyro.*pyro.infer.SVI"
    refused(TypeError, message, elbo=pyro.infer.Trace_ELBO())


def test_guide_that_is_not_ours() -> None:
    guide = pyro.infer.autoguide.AutoNormal(regression)
    message = "(?s)guide must be an AdditiveNoiseGuide, but is a AutoNormal.*pyro.infer.SVI"
    refused(TypeError, message, regression, (X, X[:, 0]), guide=guide)


def test_guide_of_another_network() -> None:
    other = BayesianNetwork(nn.Linear(4, 3), Categorical(), N)
    message = r"guide is for the sites \('weight',\), but the model has \('0.weight', '2.weight'\)"
    refused(ValueError, message, guide=AdditiveNoiseGuide(other))


def test_guide_of_a_network_of_other_widths() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    guide = AdditiveNoiseGuide(BayesianNetwork(net, Categorical(), N))
    message = r'site "0.weight", guide has shape \(6, 4\) but the model has \(5, 4\)'
    refused(ValueError, message, guide=guide)


def test_model_without_a_latent_site() -> None:
    def nothing(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x[:, 0], 1.0), obs=y)

    refused(ValueError, "the model has no latent site", nothing, (X, X[:, 0]))


def test_parameter_of_pyros_global_store() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    message = r"(?s)parameter \"scale\" of Pyro's global store.*PyroModule"
    refused(ValueError, message, model, (X, X[:, 0]))


def test_parameter_of_a_module_that_the_model_does_not_hold() -> None:
    bias = nn.Linear(1, 1)

    def model(x: Tensor, y: Tensor) -> None:
        pyro.module("bias", bias)
        w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + bias.bias, 1.0), obs=y)

    refused(ValueError, r"parameter \"bias.*of Pyro's global store", model, (X, X[:, 0]))


def test_parameters_of_a_module_are_no_trouble() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__("model")
            self.bias = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, y: Tensor) -> None:
            w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w + self.bias, 1.0), obs=y)

    refused(AssertionError, "training began", Model(), (X, X[:, 0]))


def test_validation_of_a_hand_written_model() -> None:
    message = "(?s)validation needs a BayesianNetwork.*callback"
    refused(TypeError, message, regression, (X, X[:, 0]), validation=(X, X[:, 0]))


def test_support_that_observations_leave() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    refused(ValueError, "support", model, (X, X[:, 0]))


# --- loaders, batch by batch ----------------------------------------------------------------------


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


@pytest.mark.parametrize("shuffle", [False, True])
def test_what_a_loader_gives_is_checked_as_it_comes(training: None, shuffle: bool) -> None:
    """Before the step that would use it, in the first epoch."""
    kwargs: dict[str, Any] = {"epochs": 2, "seed": 0}
    nan = DataLoader(Records(with_value(X, (25, 1), NAN), Y), batch_size=5, shuffle=shuffle)
    refused(ValueError, r"train x, batch \d, holds NaN or inf, in 1 of 5", train=nan, **kwargs)
    labels = DataLoader(Records(X, with_value(Y, 25, 9)), batch_size=5, shuffle=shuffle)
    message = r"batch \d: train y holds labels outside 0\.\.2.*: 9\. The first.* data point \d,"
    refused(ValueError, message, train=labels, **kwargs)


class Stream(IterableDataset[Any]):
    """Pairs, one after the other; nobody knows how many."""

    def __iter__(self) -> Any:
        return zip(X, Y, strict=True)


UNTOLD = {
    "stream": lambda: DataLoader(Stream(), batch_size=7),
    "stream that drops": lambda: DataLoader(Stream(), batch_size=7, drop_last=True),
    "batch sampler": lambda: DataLoader(
        Records(X, Y), batch_sampler=BatchSampler(range(N), 7, False)
    ),
}


@pytest.mark.parametrize("loader", UNTOLD.values(), ids=UNTOLD.keys())
@pytest.mark.parametrize("num_data", [15, 300])
def test_num_data_that_an_epoch_disproves(training: None, loader: Any, num_data: int) -> None:
    message = (
        rf"(?s)num_data={num_data}, but train gave (30|28) data points in the first epoch.*"
        r"num_data=(30|28)\)"
    )
    refused(ValueError, message, network(num_data=num_data), loader(), epochs=3)


@pytest.mark.parametrize("loader", UNTOLD.values(), ids=UNTOLD.keys())
def test_num_data_that_an_epoch_confirms(training: None, loader: Any) -> None:
    attempt(train=loader(), epochs=1)


def test_stream_without_a_length_serves_for_validation() -> None:
    stream = DataLoader(Stream(), batch_size=7)
    refused(AssertionError, "training began", validation=stream)
    hand_written = (regression, stream)
    refused(TypeError, "train is a DataLoader without a length", *hand_written)


def test_arrays_that_are_of_numpys_own_default_dtype() -> None:
    """The commonest mistake: float64, where networks are float32."""
    message = r"(?s)dtype torch.float64.*Try torch.as_tensor\(x, dtype=torch.float32\)"
    refused(ValueError, message, train=(np.zeros((N, 4)), Y.numpy()))
