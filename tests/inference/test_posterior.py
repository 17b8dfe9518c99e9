"""What a posterior answers."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor, nn

from bayes_svdo.distributions import LogUniform
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior, fit
from bayes_svdo.models import BayesianNetwork, Bernoulli, Categorical, Gaussian

N = 12


class Tied(nn.Module):
    """An encoder whose weight is at work again in the decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).relu())


class LastOutput(nn.Module):
    """A recurrent classifier of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(2, 3, num_layers=2, batch_first=True)
        self.readout = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.rnn(x)[0][:, -1])


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.ConvTranspose2d(3, 2, 2), nn.Flatten(), nn.Linear(18, 3)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (linear, (4,)),
    "convolutional": (convolutional, (1, 4, 4)),
    "LSTM": (LastOutput, (5, 2)),
    "tied": (Tied, (4,)),
}


def inputs(*shape: int) -> Tensor:
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(0))


def posterior_of(net: nn.Module, likelihood: Any = None, **kwargs: Any) -> Posterior:
    """An unfitted posterior, whose log alpha spread around the threshold."""
    model = BayesianNetwork(net, likelihood or Categorical(), num_data=N)
    settings = {"init_log_sigma2": -1.0, **kwargs}
    return Posterior(model, AdditiveNoiseGuide(model, **settings), threshold=2.0)


def make(name: str, **kwargs: Any) -> tuple[Posterior, Tensor]:
    torch.manual_seed(1)
    net, shape = NETWORKS[name]
    return posterior_of(net(), **kwargs), inputs(*shape)


# --- pruning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("threshold", [None, -math.inf, math.inf], ids=["some", "all", "none"])
def test_the_pruned_network_is_the_mean_network_with_zeros(name: str, threshold: Any) -> None:
    posterior, x = make(name)
    pruned = posterior.prune(threshold)
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), posterior.output(x, threshold))
    table = posterior.sparsity(threshold)
    zeros = sum(
        int((p == 0).sum()) for key, p in pruned.named_parameters() if key in posterior.means()
    )
    assert zeros == table.weights - table.nonzero
    assert zeros == {None: zeros, -math.inf: table.weights, math.inf: 0}[threshold]
    if threshold is None:
        assert 0 < zeros < table.weights
    else:
        with torch.no_grad():
            assert not torch.allclose(pruned(x), posterior.output(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_pruned_network_is_a_plain_module(name: str) -> None:
    posterior, x = make(name)
    torch.manual_seed(2)
    fresh = NETWORKS[name][0]()
    pruned = posterior.prune()
    assert type(pruned) is type(fresh)
    assert not pruned.training
    assert {k for k, _ in pruned.named_parameters()} == {k for k, _ in fresh.named_parameters()}
    fresh.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(fresh.eval()(x), pruned(x))
    pruned(x).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters() if p.requires_grad)


def test_tied_weights_stay_tied() -> None:
    posterior, _ = make("tied")
    pruned: Any = posterior.prune()
    assert pruned.decoder.weight is pruned.encoder.weight


def test_pruning_leaves_the_posterior_as_it_is() -> None:
    posterior, x = make("linear")
    before = posterior.output(x)
    pruned = posterior.prune(-math.inf)
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(9.0)
    assert torch.equal(posterior.output(x), before)


def test_weights_pruned_while_training_stay_zero_at_any_threshold() -> None:
    posterior, _ = make("linear")
    posterior.guide.prune_(2.0)
    gone = posterior.log_alpha()["0.weight"] == math.inf
    assert gone.any()
    pruned = posterior.prune(math.inf)
    assert (pruned.get_parameter("0.weight")[gone] == 0).all()


# --- sparsity -----------------------------------------------------------------------------------


def test_sparsity_counts_weights_and_what_is_no_weight() -> None:
    posterior, _ = make("linear")
    table = posterior.sparsity()
    assert table.threshold == 2.0
    assert [layer.name for layer in table] == ["0.weight", "3.weight"]
    for layer in table:
        below = int((posterior.log_alpha()[layer.name] < 2.0).sum())
        assert (layer.weights, layer.nonzero) == (
            {"0.weight": 24, "3.weight": 18}[layer.name],
            below,
        )
    assert table.num_biases == 6 + 2 * 6 + 3  # with batch normalisation's
    assert posterior.sparsity(-math.inf).compression == math.inf
    assert posterior.sparsity(math.inf).compression == 1.0
    assert posterior.summary() == str(table)


def test_weights_that_were_given_no_prior_are_no_biases() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model = BayesianNetwork(net, Categorical(), N, where="2.weight")
    table = Posterior(model, AdditiveNoiseGuide(model)).sparsity()
    assert (table.weights, table.num_biases, table.num_dense) == (18, 9, 24)


def test_sparsity_of_a_hand_written_model() -> None:
    posterior = hand_written()
    table = posterior.sparsity(math.inf)
    assert (table.weights, table.num_biases) == (4, 0)


@pytest.mark.parametrize("threshold", [math.nan, "3", True])
def test_threshold_that_is_no_number_is_refused(threshold: Any) -> None:
    posterior, x = make("linear")
    for question in (posterior.sparsity, posterior.prune, posterior.means, posterior.summary):
        with pytest.raises(ValueError, match="threshold must be a number"):
            question(threshold)
    with pytest.raises(ValueError, match="threshold must be a number"):
        posterior.output(x, threshold)


# --- predictions --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_have_a_row_per_input_and_a_layer_per_draw(name: str) -> None:
    posterior, x = make(name)
    classes = posterior.output(x).shape[1]
    assert posterior.output(x).shape == (N, classes)
    assert posterior.predict(x).shape == (N, classes)
    drawn = posterior.predict(x, num_samples=3)
    assert drawn.shape == (3, N, classes)
    assert not torch.allclose(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.sum(-1), torch.ones(3, N))
    torch.testing.assert_close(posterior.predict(x), posterior.output(x).softmax(-1))
    torch.testing.assert_close(
        posterior.predict(x, threshold=math.inf), posterior.output(x, math.inf).softmax(-1)
    )


@pytest.mark.parametrize(
    ("likelihood", "outputs", "mean"),
    [
        (Bernoulli(), 1, torch.sigmoid),
        (Gaussian(0.3), 2, lambda output: output),
        (Gaussian(noise="heteroscedastic"), 4, lambda output: output[..., :2]),
    ],
)
def test_predictions_are_means_of_the_likelihood(likelihood: Any, outputs: int, mean: Any) -> None:
    torch.manual_seed(3)
    posterior = posterior_of(nn.Linear(4, outputs), likelihood)
    x = inputs(4)
    torch.testing.assert_close(posterior.predict(x), mean(posterior.output(x)))
    assert posterior.predict(x, 5).shape[:2] == (5, N)


def test_memory_is_bounded_by_the_batch_size() -> None:
    sizes: list[int] = []

    class Watched(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            sizes.append(len(input))
            return super().forward(input)

    torch.manual_seed(4)
    posterior = posterior_of(Watched(4, 3))
    x = inputs(4)
    whole = posterior.output(x)
    assert sizes == [12]
    torch.testing.assert_close(posterior.output(x, batch_size=5), whole)
    assert posterior.predict(x, batch_size=5).shape == (12, 3)
    assert sizes[1:] == [5, 5, 2] * 2
    assert posterior.predict(x, 2, batch_size=5).shape == (2, 12, 3)
    assert max(sizes[4:]) == 5


@pytest.mark.parametrize("name", NETWORKS)
def test_draws_have_the_mean_and_spread_of_networks_with_drawn_weights(name: str) -> None:
    """400 draws of each kind; 5 standard errors of 48 numbers: by chance once in 3e4 seeds."""
    posterior, x = make(name, init_log_sigma2=-3.0)
    torch.manual_seed(5)
    drawn = posterior.predict(x, num_samples=400)
    posterior.model.eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        by_weight = torch.stack(
            [
                torch.func.functional_call(posterior.model.net, posterior.guide(), (x,)).softmax(-1)  # type: ignore[attr-defined]
                for _ in range(400)
            ]
        )
    error = ((drawn.var(0) + by_weight.var(0)) / 400).sqrt()
    assert ((drawn.mean(0) - by_weight.mean(0)).abs() < 5 * error).all()
    # A standard deviation from 400 draws is known to some 5 %, for these skewed ones to 10 %.
    ratio = drawn.std(0) / by_weight.std(0)
    assert (ratio.log().abs() < 0.5).all()


def test_predictions_take_arrays_lists_and_several_inputs() -> None:
    posterior, x = make("linear")
    torch.testing.assert_close(posterior.output(x.numpy()), posterior.output(x))
    torch.testing.assert_close(posterior.output(x.tolist()), posterior.output(x))
    torch.manual_seed(6)
    two = posterior_of(nn.Bilinear(4, 4, 3))
    assert two.predict((x, x)).shape == (N, 3)
    assert two.predict((x, x), 2, batch_size=5).shape == (2, N, 3)


def test_asking_changes_neither_mode_nor_gradients_nor_parameters() -> None:
    posterior, x = make("linear")
    model: Any = posterior.model.train()  # type: ignore[attr-defined]
    model.net[1].eval()  # frozen statistics, say
    pyro.param("mine", torch.tensor(1.0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not posterior.output(x).requires_grad
    assert not posterior.predict(x, 2).requires_grad
    assert model.training
    assert not model.net[1].training
    assert model.net[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_two_posteriors_do_not_share_parameters() -> None:
    """They would, by name, in Pyro's global store."""
    (one, x), (other, _) = make("linear"), make("linear")
    with torch.no_grad():
        for parameter in other.guide.location_parameters():
            parameter.add_(1.0)
    expected = other.output(x)
    one.predict(x, 1)
    other.predict(x, 1)
    torch.testing.assert_close(other.output(x), expected)


@pytest.mark.parametrize("argument", ["num_samples", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_counts_that_are_none_are_refused(argument: str, value: Any) -> None:
    posterior, x = make("linear")
    with pytest.raises(ValueError, match=f"{argument} must be an integer of at least 1"):
        posterior.predict(x, **{argument: value})


@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 5), r"cannot take x of shape \(3, 5\), dtype torch.float32: .*shapes"),
        (torch.zeros(3, 4).double(), r"cannot take x of shape \(3, 4\), dtype torch.float64"),
        (torch.zeros(3, 4, dtype=torch.uint8), r"cannot take x of .*dtype torch.uint8"),
        (torch.zeros(0, 4), "x is empty"),
        (torch.full((3, 4), math.nan), "x holds NaN or inf"),
        ("images", "x must be a tensor or an array, but is a str"),
        (None, "x must be a tensor or an array, but is a NoneType"),
    ],
)
def test_inputs_that_do_not_fit_are_named(x: Any, message: str, num_samples: Any) -> None:
    posterior, _ = make("linear")
    with pytest.raises((TypeError, ValueError), match=message):
        posterior.predict(x, num_samples)


# --- hand-written models ------------------------------------------------------------------------


def hand_written() -> Posterior:
    def regression(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    guide = AdditiveNoiseGuide(regression, init={"w": torch.ones(4)})
    guide(inputs(4), torch.zeros(N))
    return Posterior(regression, guide)


def test_questions_about_a_network_say_what_to_do_for_another_model() -> None:
    posterior = hand_written()
    assert torch.equal(posterior.means()["w"], torch.ones(4))
    message = r"(?s){} needs a BayesianNetwork, but the model is regression.*Try {}"
    with pytest.raises(TypeError, match=message.format("prune", r"posterior.means\(\)")):
        posterior.prune()
    for question in ("output", "predict"):
        with pytest.raises(TypeError, match=message.format(question, "pyro.infer.Predictive")):
            getattr(posterior, question)(inputs(4))
    samples = Predictive(posterior.guide.model, guide=posterior.guide, num_samples=3)(inputs(4))
    assert samples["y"].shape == (3, N)


def test_a_posterior_says_what_it_is() -> None:
    posterior, _ = make("linear")
    assert repr(posterior) == "Posterior(0.weight, 3.weight; threshold=2.0, epochs=0)"


@pytest.mark.cuda
@pytest.mark.parametrize("name", NETWORKS)
def test_predictions_are_the_same_on_a_gpu(name: str) -> None:
    posterior, x = make(name)
    here = posterior.output(x)
    posterior.to("cuda")
    assert posterior.device.type == "cuda"
    there = posterior.output(x)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-4)
    assert posterior.predict(x, 2).is_cuda
    torch.testing.assert_close(posterior.prune().cpu()(x), here, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("copy", [None, deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_pyros_predictive_does_not_write_one_posterior_into_another(copy: Any) -> None:
    """Pyro's parameter store goes by names, and all posteriors are of the same classes."""
    x = torch.randn(100, 1)
    model = BayesianNetwork(nn.Linear(1, 1), Gaussian(0.5), 100)
    settings: dict[str, Any] = {"epochs": 20, "lr": 0.1, "progress": False, "seed": 0}
    one = fit(model, (x, 2 * x), **settings)
    other = fit(model, (x, -2 * x), **settings) if copy is None else copy(one)
    if copy is not None:
        with torch.no_grad():
            for parameter in other.guide.location_parameters():
                parameter.neg_()
    expected = [posterior.output(x) for posterior in (one, other)]
    for posterior in (one, other):
        Predictive(posterior.model, guide=posterior.guide, num_samples=1)(x)
    for posterior, output in zip((one, other), expected, strict=True):
        torch.testing.assert_close(posterior.output(x), output)
    assert (expected[0] - expected[1]).abs().max() > 1


# --- priors that do not prune -------------------------------------------------------------------


def test_sites_under_a_proper_prior_are_dense() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model = BayesianNetwork(net, Categorical(), N, prior=dist.Normal(0.0, 1.0))
    posterior = Posterior(model, AdditiveNoiseGuide(model, init_log_sigma2=9.0))
    assert all((value > 3).any() for value in posterior.log_alpha().values())
    for name, mean in posterior.means(-math.inf).items():
        assert torch.equal(mean, net.get_parameter(name))
    x = inputs(4)
    torch.testing.assert_close(posterior.prune()(x), net(x))
    table = posterior.sparsity()
    assert (table.nonzero, table.percent, table.compression) == (42, 0.0, 1.0)
    assert table[0].log_alpha[-1] > 3  # still to be seen


def test_an_array_of_numpys_own_dtype_is_refused_with_what_an_array_can_do() -> None:
    posterior, _ = make("linear")
    message = r"(?s)dtype torch.float64.*Try torch\.as_tensor\(x, dtype=torch\.float32\)"
    with pytest.raises(ValueError, match=message):
        posterior.predict(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=message):
        posterior.predict(np.zeros((3, 4)), 2)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = posterior_of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r'unknown device "cdua".*Did you mean "cuda"\?'):
        posterior.to("cdua")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r'device "cuda" is not available.*0 CUDA devices'):
        posterior.to("cuda")
    assert posterior.to("cpu").device.type == "cpu"
