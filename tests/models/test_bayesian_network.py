from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_sequence

from bayes_svdo.distributions import (
    EmpiricalBayes,
    LocalReparameterization,
    LogUniform,
    UndrawnSample,
)
from bayes_svdo.inference import AdditiveNoiseGuide, TraceAnalyticKL_ELBO
from bayes_svdo.models import BayesianNetwork, Bernoulli, Categorical, Gaussian, dense

M, D, K = 6, 4, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(5)


class Convolutional(nn.Module):
    """A small residual network with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, K)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv(x)))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.rnn = kind(D, 3, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, K)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(D, K)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        out: Tensor = self.head(self.attention(x, x, x)[0].mean(1))
        return out


class Tied(nn.Module):
    """A language model: the embedding is the decoder, too."""

    def __init__(self, words: int = K, features: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, features)
        self.decoder = nn.Linear(features, words, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(self.embedding(x))
        return out


class Siamese(nn.Module):
    """One linear map of two inputs, shape (M, 2, D) to (M, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Linear(D, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch(x[:, 0]), self.branch(x[:, 1])], dim=-1)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Binarised(nn.Module):
    """Signs of weights, with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, K)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, _Sign.apply(self.fc.weight), self.fc.bias)


def mlp() -> nn.Sequential:
    return dense((D, 5, K))


FLAT, SEQUENCE, IMAGE = (M, D), (M, 4, D), (M, 1, 6, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (mlp, FLAT),
    "convolutional": (Convolutional, IMAGE),
    "lstm": (Recurrent, SEQUENCE),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE),
    "attention": (Attention, SEQUENCE),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(4 * D, K),
        ),
        SEQUENCE,
    ),
    "weight normalised": (
        lambda: nn.Sequential(weight_norm(nn.Linear(D, 5)), nn.ReLU(), nn.Linear(5, K)),
        FLAT,
    ),
    "binarised": (Binarised, FLAT),
    "one layer": (lambda: nn.Linear(D, K), FLAT),
}  # fmt: skip
each_network = pytest.mark.parametrize("name", NETWORKS)


def network(net: nn.Module, **kwargs: Any) -> BayesianNetwork:
    return BayesianNetwork(net, Categorical(), num_data=M, **kwargs)


def labels() -> Tensor:
    return torch.randint(K, (M,))


def at(model: BayesianNetwork, weights: dict[str, Tensor]) -> Callable[..., Tensor]:
    conditioned: Callable[..., Tensor] = poutine.condition(model, data=weights)
    return conditioned


# --- The lift ---------------------------------------------------------------------------------


@each_network
def test_at_given_weights_it_is_the_stock_net_with_these_weights(name: str) -> None:
    make, shape = NETWORKS[name]
    net = make().eval()
    model = network(net).eval()
    x = torch.randn(shape)
    torch.testing.assert_close(at(model, model.initial_weights())(x), net(x))
    weights = {name: torch.randn_like(w) for name, w in model.initial_weights().items()}
    stock = make().eval()
    stock.load_state_dict({**net.state_dict(), **weights})
    torch.testing.assert_close(at(model, weights)(x), stock(x))
    assert not torch.allclose(stock(x), net(x))


@each_network
def test_every_parameter_learns_and_the_users_net_is_left_alone(name: str) -> None:
    make, shape = NETWORKS[name]
    net = make()
    before = copy.deepcopy(net.state_dict())
    names = [name for name, _ in net.named_parameters()]
    model = network(net)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    elbo = TraceAnalyticKL_ELBO(kl_weight=0.0)
    elbo.differentiable_loss(model, guide, torch.randn(shape), labels()).backward()
    unused = {"weight_hh_l1_reverse"} if isinstance(net, Recurrent) else set()  # at the last step
    for parameter_name, parameter in [*guide.named_parameters(), *model.named_parameters()]:
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
        if "attention.in_proj_bias" in parameter_name or any(u in parameter_name for u in unused):
            continue
        assert (parameter.grad != 0).any(), parameter_name
    assert [name for name, _ in net.named_parameters()] == names
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("name", ["dense", "lstm", "attention"])
def test_elbo_gradients_match_those_of_the_stock_objective_for_drawn_weights(name: str) -> None:
    """Without local reparameterization, and the same seed, they are one computation."""
    make, shape = NETWORKS[name]
    model = network(make())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    x, y = torch.randn(shape), labels()
    gradients = []
    for elbo in (
        TraceAnalyticKL_ELBO(local_reparameterization=False),
        pyro.infer.TraceMeanField_ELBO(),
    ):
        guide.zero_grad()
        torch.manual_seed(0)
        elbo.differentiable_loss(model, guide, x, y).backward()
        gradients.append([p.grad.clone() for p in guide.parameters() if p.grad is not None])
    for ours, stock in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_those_of_the_copy() -> None:
    net = Convolutional()
    model = network(net)
    elbo, guide = TraceAnalyticKL_ELBO(), AdditiveNoiseGuide(model)
    elbo.loss(model, guide, torch.randn(IMAGE) + 3, labels())
    assert net.bn1.num_batches_tracked == 0
    assert model.net.get_submodule("bn1").num_batches_tracked == 1
    assert not torch.equal(model.net.get_submodule("bn1").running_mean, torch.zeros(4))


def test_after_a_failed_pass_the_copy_has_its_own_weights_again() -> None:
    model = network(Tied())
    own = model.net.get_buffer("embedding.weight")
    with pytest.raises(RuntimeError):
        at(model, {"embedding.weight": torch.zeros(K, 2)})(torch.randn(2))  # no indices
    assert model.net.get_buffer("embedding.weight") is own
    assert model.net.get_buffer("decoder.weight") is own


def test_inputs_may_be_a_tuple() -> None:
    model = BayesianNetwork(nn.Bilinear(D, 2, 1), Gaussian(), num_data=M)
    x = (torch.randn(M, D), torch.randn(M, 2))
    torch.testing.assert_close(
        at(model, model.initial_weights())(x),
        F.bilinear(*x, model.initial_weights()["weight"], model.net.bias),
    )
    loss = TraceAnalyticKL_ELBO().loss(model, AdditiveNoiseGuide(model), x, torch.randn(M, 1))
    assert math.isfinite(loss)


def test_a_packed_sequence_is_one_input() -> None:
    class LastState(nn.GRU):
        def forward(self, x: Any, hx: Any = None) -> Any:
            return super().forward(x, hx)[1][0]

    net = LastState(D, K)
    x = pack_sequence([torch.randn(3, D), torch.randn(2, D)])
    model = network(net)
    torch.testing.assert_close(at(model, model.initial_weights())(x), net(x))


def test_a_net_that_does_not_return_a_tensor_is_refused_with_advice() -> None:
    model = network(nn.LSTM(D, K, batch_first=True))
    with pytest.raises(TypeError, match=r"net must return one tensor, but returned a tuple"):
        at(model, model.initial_weights())(torch.randn(SEQUENCE))


# --- Which parameters --------------------------------------------------------------------------


def test_by_default_weights_have_a_prior_and_biases_and_normalisation_do_not() -> None:
    model = network(Convolutional())
    assert model.sites == ("stem.weight", "conv.weight", "head.weight")
    assert {name for name, _ in model.net.named_parameters()} == {
        "stem.bias", "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias", "head.bias",
    }  # fmt: skip
    attention = network(Attention())
    assert attention.sites == (
        "attention.in_proj_weight", "attention.out_proj.weight", "head.weight",
    )  # fmt: skip


@pytest.mark.parametrize(
    "layer",
    [
        nn.LayerNorm((2, 3)),
        nn.BatchNorm1d(3),
        nn.InstanceNorm2d(3, affine=True),
        nn.GroupNorm(1, 3),
        nn.RMSNorm((2, 3)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_normalisation_layers_stay_point_estimates_whatever_their_shape(layer: nn.Module) -> None:
    model = network(nn.Sequential(nn.Linear(D, K), layer))
    assert model.sites == ("0.weight",)


def test_frozen_parameters_stay_frozen_unless_asked_for() -> None:
    net = mlp()
    net.fc1.weight.requires_grad_(False)
    assert network(net).sites == ("fc2.weight",)
    assert not network(net).net.get_parameter("fc1.weight").requires_grad
    assert network(net, where="*.weight").sites == ("fc1.weight", "fc2.weight")


@pytest.mark.parametrize(
    ("where", "sites"),
    [
        ("fc1.weight", ["fc1.weight"]),
        ("fc*.weight", ["fc1.weight", "fc2.weight"]),
        ("*", ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
        (nn.Linear, ["fc1.weight", "fc2.weight"]),
        (lambda name, parameter: parameter.numel() == 15, ["fc2.weight"]),
        (["fc2.weight", "fc1.bias"], ["fc1.bias", "fc2.weight"]),
        (("fc2.bias", nn.Linear), ["fc1.weight", "fc2.weight", "fc2.bias"]),
    ],
    ids=["name", "pattern", "everything", "type", "predicate", "list", "tuple"],
)
def test_where_selects_in_the_order_of_the_net(where: Any, sites: list[str]) -> None:
    model = network(mlp(), where=where)
    assert list(model.sites) == sites
    assert set(model.initial_weights()) == set(sites)
    points = {name for name, _ in model.net.named_parameters()}
    assert points == {f"fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")} - set(sites)


def test_a_predicate_sees_the_parameters_of_the_users_own_net() -> None:
    net = mlp()
    assert network(net, where=lambda name, p: p is net.fc2.weight).sites == ("fc2.weight",)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("fc1.wieght", r'"fc1\.wieght"|fc1\.wieght.* Did you mean "fc1\.weight"\?'),
        (nn.Conv2d, r"Conv2d.*selects none.*\n.*fc1\.weight, fc1\.bias"),
        (lambda name, parameter: False, "selects none"),
        (["fc1.weight", "fc3.weight"], r"where='fc3\.weight' selects none.*Did you mean"),
        ([], r"where=\[\] selects none"),
    ],
    ids=["name", "type", "predicate", "one of a list", "empty list"],
)
def test_a_where_that_selects_nothing_is_refused_with_what_there_is(where: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        network(mlp(), where=where)
    assert "fc1.weight, fc1.bias, fc2.weight, fc2.bias" in str(caught.value)


def test_the_closest_name_is_offered() -> None:
    with pytest.raises(ValueError, match=r'Did you mean "fc1\.weight"\?'):
        network(mlp(), where="fc1.wieght")


@pytest.mark.parametrize("where", [3, [3], int, nn.Linear(1, 1)])
def test_a_where_of_a_wrong_type_is_refused(where: Any) -> None:
    with pytest.raises(TypeError, match="where must be a name pattern, a module type"):
        network(mlp(), where=where)


@pytest.mark.parametrize("where", [lambda name: True, lambda name, parameter, module: True])
def test_a_predicate_of_other_arguments_is_refused(where: Any) -> None:
    message = "where must be a function of 2 arguments, the name and the parameter, but <lambda>"
    with pytest.raises(TypeError, match=message):
        network(mlp(), where=where)


def test_a_net_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"selects none.*\n.*no parameters"):
        network(nn.ReLU())


def test_a_lazy_net_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r'"0\.weight" has no shape yet.*\n.*net\(x\)'):
        network(nn.Sequential(nn.LazyLinear(3)))


def test_weights_that_are_not_real_are_refused() -> None:
    net = nn.Module()
    net.w = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r'"w" has dtype torch\.complex64.*floating-point'):
        network(net)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"net": lambda x: x}, TypeError, "net must be a torch.nn.Module, but is a function"),
        (
            {"likelihood": Categorical},
            TypeError,
            r"likelihood must be an instance.*Categorical\(\)",
        ),
        ({"likelihood": nn.CrossEntropyLoss()}, TypeError, "likelihood must be.*CrossEntropyLoss"),
        ({"num_data": 0}, ValueError, "num_data must be.*at least 1, but is 0"),
        ({"num_data": -5}, ValueError, "but is -5"),
        ({"num_data": 10.0}, ValueError, "an integer of at least 1, but is 10.0"),
        ({"num_data": True}, ValueError, "but is True"),
        ({"num_data": None}, ValueError, "but is None"),
        ({"prior": LogUniform}, TypeError, "prior must be a Pyro distribution over one weight"),
        ({"prior": 1.0}, TypeError, "prior must be.*but is 1.0"),
        ({"prior": dist.Normal(torch.zeros(3), 1.0)}, TypeError, "empty batch and event shape"),
        ({"prior": dist.Normal(0.0, 1.0).expand([2]).to_event(1)}, TypeError, "prior must be"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: Any, words: str) -> None:
    arguments = {"net": mlp(), "likelihood": Categorical(), "num_data": M} | change
    with pytest.raises(error, match=words):
        BayesianNetwork(**arguments)


def test_num_data_is_required() -> None:
    with pytest.raises(TypeError, match="num_data"):
        BayesianNetwork(mlp(), Categorical())  # type: ignore[call-arg]


# --- Tied weights, shared weights --------------------------------------------------------------


@pytest.mark.parametrize(
    "where", [None, "embedding.weight", "decoder.weight", nn.Linear, nn.Embedding]
)
def test_a_tied_weight_is_one_site_whichever_name_selects_it(where: Any) -> None:
    net = Tied()
    model = network(net, where=where)
    assert model.sites == ("embedding.weight",)
    assert list(model.net.parameters()) == []
    assert model.net.get_buffer("decoder.weight") is model.net.get_buffer("embedding.weight")
    assert net.decoder.weight is net.embedding.weight
    words = torch.tensor([0, 2])
    weight = torch.randn(K, 2)
    torch.testing.assert_close(
        at(model, {"embedding.weight": weight})(words), weight[words] @ weight.T
    )
    deep = copy.deepcopy(model)
    assert deep.net.get_buffer("decoder.weight") is deep.net.get_buffer("embedding.weight")


def outputs(
    model: BayesianNetwork, x: Tensor, draws: int, log_sigma2: float, **elbo: Any
) -> Tensor:
    """Outputs through the objective, shape (draws, *output)."""
    guide = AdditiveNoiseGuide(model, init_log_sigma2=log_sigma2)
    objective = TraceAnalyticKL_ELBO(**elbo)
    y = torch.zeros_like(at(model, model.initial_weights())(x))
    with torch.no_grad():
        return torch.stack(
            [objective.terms(model, guide, x, y).output for _ in range(draws)]
        ).double()


def test_tied_weights_share_one_draw() -> None:
    """Where a word meets itself the mean is E[w²] = loc² + sigma²; 6 standard errors."""
    model = BayesianNetwork(Tied(), Gaussian(), num_data=K)
    draws, words = 500, torch.arange(K)
    loc = model.initial_weights()["embedding.weight"].double()
    sigma2 = math.exp(-0.5)
    independent = loc @ loc.T
    shared = independent + torch.eye(K) * 2 * sigma2
    output = outputs(model, words, draws, -0.5)
    error = 6 * output.std(0) / draws**0.5
    assert ((output.mean(0) - shared).abs() < error).all()
    assert not ((output.mean(0) - independent).abs() < error).all()
    output = outputs(model, words, draws, -0.5, reuse="independent")
    assert ((output.mean(0) - independent).abs() < 6 * output.std(0) / draws**0.5).all()


def test_branches_that_share_a_weight_have_its_joint_second_moments() -> None:
    """6 standard errors of a product of Gaussians; fails by chance once in 1e7 runs."""
    model = BayesianNetwork(Siamese(), Gaussian(), num_data=M)
    draws = 500
    x = torch.randn(M, 2, D)
    deviation = outputs(model, x, draws, 0.0) - at(model, model.initial_weights())(x)
    second = torch.einsum("snb,smc->nbmc", deviation, deviation) / draws
    # One weight for the whole batch, too: every row is correlated with every other.
    exact = torch.einsum("nbd,mcd->nbmc", x.double(), x.double())
    variance = exact.flatten(2).flatten(0, 1).diagonal().reshape(M, 2)
    bound = 6 * ((variance[:, :, None, None] * variance + exact.square()) / draws).sqrt()
    assert ((second - exact).abs() < bound).all()
    independent = outputs(model, x, draws, 0.0, reuse="independent")
    covariance = torch.cov(independent[:, 0].T)
    assert covariance[0, 1].abs() < 6 * (variance[0].prod() / draws).sqrt()


def test_a_shared_weight_has_unbiased_gradients() -> None:
    """d E[y1 y2] / d log_sigma2 = sigma² x1 x2; 6 standard errors, four weights."""
    model = BayesianNetwork(Siamese(), Product(), num_data=1)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=0.0)
    elbo = TraceAnalyticKL_ELBO(kl_weight=0.0)
    x, draws = torch.randn(1, 2, D), 500
    gradients = []
    for _ in range(draws):
        guide.zero_grad()
        elbo.differentiable_loss(model, guide, x, torch.zeros(1)).backward()
        gradients.append(guide.sigma_parameters()[0].grad.clone())  # type: ignore[union-attr]
    found = torch.stack(gradients).squeeze(1)
    exact = (x[0, 0] * x[0, 1]).expand(draws, D).mean(0)
    assert ((found.mean(0) - exact).abs() < 6 * found.std(0) / draws**0.5).all()


class Product(Gaussian):
    """Scores the product of the two outputs, as it is."""

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        return dist.Unit(-output.prod(-1), has_rsample=True, validate_args=False)

    def forward(self, output: Tensor, y: Any, num_data: int, sample_dims: int = 0) -> None:
        pyro.sample("y", self.distribution(output).to_event(1), obs=torch.empty(1, 0))


def test_weights_that_a_custom_function_uses_are_drawn_with_their_gradient() -> None:
    """A straight-through estimator: d/dloc is the gradient with respect to the sign."""
    model = network(Binarised())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-80.0)
    x, y = torch.randn(M, D), labels()
    TraceAnalyticKL_ELBO(kl_weight=0.0).differentiable_loss(model, guide, x, y).backward()
    signs = model.initial_weights()["fc.weight"].sign().requires_grad_()
    F.cross_entropy(F.linear(x, signs, model.net.fc.bias), y, reduction="sum").backward()
    torch.testing.assert_close(guide.location_parameters()[0].grad, signs.grad)


# --- Probabilities ------------------------------------------------------------------------------


def test_batches_scaled_by_num_data_have_the_mean_of_the_whole_data_set() -> None:
    x, y = torch.randn(12, D).double(), torch.randint(K, (12,))
    net = mlp().double()
    model = BayesianNetwork(net, Categorical(), num_data=12)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-80.0)
    elbo = TraceAnalyticKL_ELBO()
    whole = elbo.terms(model, guide, x, y)
    parts = [
        elbo.terms(model, guide, *batch).nll for batch in zip(x.split(3), y.split(3), strict=True)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole.nll)
    torch.testing.assert_close(whole.nll, F.cross_entropy(net(x), y, reduction="sum"))
    for part in parts:
        assert not torch.isclose(part, whole.nll)


def test_a_batch_larger_than_num_data_is_refused() -> None:
    model = BayesianNetwork(mlp(), Categorical(), num_data=5)
    with pytest.raises(ValueError, match=r"the batch holds 6 data points, but num_data=5"):
        at(model, model.initial_weights())(torch.randn(M, D), labels())


def test_an_improper_prior_is_not_sampled_by_accident() -> None:
    for prior in (LogUniform(), EmpiricalBayes()):
        with pytest.raises(NotImplementedError, match="cannot be sampled"):
            network(mlp(), prior=prior)(torch.randn(M, D))


def test_a_proper_prior_is_sampled() -> None:
    """Prior predictive variance of a linear layer; 6 standard errors: once in 5e8 runs."""
    model = BayesianNetwork(nn.Linear(D, 1, bias=False), Gaussian(), M, dist.Normal(0.0, 2.0))
    x = torch.randn(1, D)
    with torch.no_grad():
        drawn = torch.stack([model(x) for _ in range(500)]).flatten()
    expected = 4 * x.square().sum()
    assert (drawn.square().mean() / expected - 1).abs() < 6 * (2 / 500) ** 0.5


def test_the_prior_moves_with_the_network() -> None:
    prior = dist.Normal(torch.tensor(0.0), torch.tensor(1.0))
    model = network(mlp(), prior=prior)
    assert model.prior.loc.dtype == torch.float32
    assert model.double().prior.loc.dtype == torch.float64
    assert network(mlp().double(), prior=prior).prior.loc.dtype == torch.float64
    assert model.to("meta").prior.scale.is_meta
    assert prior.loc.dtype == torch.float32
    assert prior.loc.device.type == "cpu"
    nested = dist.StudentT(3.0)
    assert network(mlp().double(), prior=nested).prior._chi2.df.dtype == torch.float64
    assert isinstance(network(mlp(), prior=LogUniform("exact")).double().prior, LogUniform)


def test_state_dict_round_trips_and_takes_that_of_the_net() -> None:
    net = Convolutional()
    model, other = network(net), network(Convolutional())
    other.load_state_dict(model.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    other = network(Convolutional())
    other.net.load_state_dict(net.state_dict())
    assert torch.equal(other.initial_weights()["stem.weight"], net.stem.weight)


@pytest.mark.parametrize("name", ["dense", "lstm", "convolutional"])
def test_models_and_guides_can_be_copied_and_pickled(name: str) -> None:
    make, shape = NETWORKS[name]
    model = network(make()).eval()
    x, y = torch.randn(shape), labels()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    TraceAnalyticKL_ELBO().loss(model, guide, x, y)
    for duplicate in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        twin, twin_guide = duplicate(model), duplicate(guide)
        losses = []
        for m, g in ((model, guide), (twin, twin_guide)):
            pyro.clear_param_store()
            torch.manual_seed(1)
            losses.append(TraceAnalyticKL_ELBO().loss(m, g, x, y))
        assert losses[0] == losses[1]
        with torch.no_grad():
            twin.net.get_buffer(twin.sites[0]).zero_()
        assert (model.initial_weights()[model.sites[0]] != 0).any()


def test_layer_of_a_site() -> None:
    model = network(Convolutional())
    assert model.layer_of("stem.weight") is model.net.get_submodule("stem")
    assert network(nn.Linear(D, K)).layer_of("weight").__class__ is nn.Linear


# --- Handlers, particles, Predictive --------------------------------------------------------------


def test_handlers_act_on_its_sites() -> None:
    model = network(mlp())
    x, y = torch.randn(M, D), labels()
    given = at(model, model.initial_weights())
    trace = poutine.trace(given).get_trace(x, y)
    assert trace.stochastic_nodes == ["data"]
    assert trace.observation_nodes == ["fc1.weight", "fc2.weight", "y"]
    assert trace.nodes["y"]["scale"] == 1.0
    trace.compute_log_prob()
    scaled = poutine.trace(poutine.scale(given, scale=0.5)).get_trace(x, y)
    scaled.compute_log_prob()
    for name in trace.observation_nodes:
        torch.testing.assert_close(
            scaled.nodes[name]["log_prob_sum"], 0.5 * trace.nodes[name]["log_prob_sum"]
        )
    blocked = poutine.trace(poutine.block(given, hide=["y"])).get_trace(x, y)
    assert "y" not in blocked.nodes
    replayed = poutine.trace(poutine.replay(model, trace=_latent(trace))).get_trace(x)
    torch.testing.assert_close(replayed.nodes["_RETURN"]["value"], trace.nodes["_RETURN"]["value"])


def _latent(trace: poutine.Trace) -> poutine.Trace:
    """The trace with its weights no longer observed, as a guide's is."""
    trace = trace.copy()
    for name in trace.observation_nodes:
        trace.nodes[name]["is_observed"] = False
    return trace


@pytest.mark.parametrize("name", ["dense", "convolutional", "lstm"])
def test_vectorised_particles_have_the_distribution_of_looped_ones(name: str) -> None:
    """Mean and spread of the NLL; 6 standard errors: fails by chance once in 5e8 runs per case."""
    make, shape = NETWORKS[name]
    model = network(make())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-1.0)
    x, y = torch.randn(shape), labels()
    draws = 200
    with torch.no_grad():
        looped = [TraceAnalyticKL_ELBO().terms(model, guide, x, y) for _ in range(draws)]
        vectorised = TraceAnalyticKL_ELBO(
            num_particles=draws, vectorize_particles=True, max_plate_nesting=1
        ).terms(model, guide, x, y)
    assert vectorised.output.shape == (draws, M, K)
    for site, kl in looped[0].kl.items():
        torch.testing.assert_close(vectorised.kl[site], kl, rtol=1e-5, atol=0)
    nll = torch.stack([terms.nll for terms in looped])
    each = (
        F.cross_entropy(vectorised.output.flatten(0, 1), y.repeat(draws), reduction="none")
        .reshape(draws, M)
        .sum(1)
    )
    torch.testing.assert_close(vectorised.nll, each.mean(), rtol=1e-5, atol=0)
    error = ((nll.var() + each.var()) / draws).sqrt()
    assert (each.mean() - nll.mean()).abs() < 6 * error
    for output_of in (lambda o: o.mean(0), lambda o: o.std(0)):
        spread = torch.stack([terms.output for terms in looped])
        difference = output_of(spread) - output_of(vectorised.output)
        assert (difference.abs() < 6 * spread.std(0) * (2 / draws) ** 0.5).all()


def test_vectorised_particles_have_gradients() -> None:
    model = network(mlp())
    guide = AdditiveNoiseGuide(model)
    elbo = TraceAnalyticKL_ELBO(num_particles=3, vectorize_particles=True)
    elbo.differentiable_loss(model, guide, torch.randn(M, D), labels()).backward()
    for parameter in [*guide.parameters(), *model.parameters()]:
        assert parameter.grad is not None
        assert (parameter.grad != 0).any()


def test_vectorised_particles_are_one_call_of_the_network_each_with_its_own_noise() -> None:
    calls = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(x.shape)
            return super().forward(x)

    model = BayesianNetwork(Counted(D, K), Categorical(), M)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-1.0)
    elbo = TraceAnalyticKL_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    x, y = torch.randn(M, D), labels()
    guide(x, y)
    calls.clear()
    terms = elbo.terms(model, guide, x, y)
    assert calls == [(M, D)]
    assert terms.output.shape == (5, M, K)
    assert len(terms.output.flatten(1).unique(dim=0)) == 5
    expected = F.cross_entropy(terms.output.flatten(0, 1), y.repeat(5), reduction="sum") / 5
    torch.testing.assert_close(terms.nll, expected)
    torch.testing.assert_close(
        terms.total_kl(), TraceAnalyticKL_ELBO().terms(model, guide, x, y).total_kl()
    )


def test_particles_of_a_network_that_vmap_does_not_take_are_looped() -> None:
    net = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, K))
    model = BayesianNetwork(net, Categorical(), M)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-1.0)
    elbo = TraceAnalyticKL_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    x, y = torch.randn(M, D), labels()
    guide(x, y)
    before = int(model.net[1].num_batches_tracked)
    assert elbo.terms(model, guide, x, y).output.shape == (3, M, K)
    assert int(model.net[1].num_batches_tracked) == before + 3


@pytest.mark.parametrize("nesting", [1, 2, 3])
def test_particles_are_counted_once_however_many_plates_there_may_be(nesting: int) -> None:
    """The particles' plate is left of ``max_plate_nesting`` dimensions, most of them empty."""
    model = BayesianNetwork(mlp().double(), Categorical(), M)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-80.0)
    x, y = torch.randn(M, D).double(), labels()
    elbo = TraceAnalyticKL_ELBO(
        num_particles=4, vectorize_particles=True, max_plate_nesting=nesting
    )
    single = TraceAnalyticKL_ELBO().terms(model, guide, x, y)
    terms = elbo.terms(model, guide, x, y)
    torch.testing.assert_close(terms.nll, single.nll)
    assert terms.output.shape == (4, *(1,) * (nesting - 1), M, K)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", ["dense", "lstm"])
def test_predictive_draws_from_the_posterior(name: str, parallel: bool) -> None:
    """Class frequencies against the mean softmax; 6 standard errors: once in 2e7 runs."""
    make, shape = NETWORKS[name]
    model = network(make())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-1.0)
    x, draws = torch.randn(shape), 200
    sites = ["y", "_RETURN", model.sites[0]]
    found = Predictive(
        model, guide=guide, num_samples=draws, parallel=parallel, return_sites=sites
    )(x)
    assert found["y"].shape == (draws, M)
    assert found["_RETURN"].shape == (draws, M, K)
    weight = found[model.sites[0]]
    own = model.initial_weights()[model.sites[0]]
    assert weight.shape == (draws, 1, *own.shape)  # Pyro's place for the data plate
    assert ((weight.mean((0, 1)) - own).abs() < 6 * math.exp(-0.5) / draws**0.5).all()
    probability = found["_RETURN"].softmax(-1)
    frequency = F.one_hot(found["y"], K).double()
    error = (probability * (1 - probability)).mean(0).sqrt() / draws**0.5
    assert ((frequency.mean(0) - probability.mean(0)).abs() < 6 * error + 1e-9).all()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_at_given_weights_is_the_net(parallel: bool) -> None:
    net = mlp()
    model = network(net)
    samples = {name: w[None].repeat(2, 1, 1) for name, w in model.initial_weights().items()}
    x = torch.randn(M, D)
    found = Predictive(model, samples, parallel=parallel, return_sites=["_RETURN"])(x)
    torch.testing.assert_close(found["_RETURN"], net(x).expand(2, M, K))


def test_one_posterior_sample_in_parallel_is_one_sample() -> None:
    model = BayesianNetwork(mlp(), Bernoulli(), M)
    guide = AdditiveNoiseGuide(model)
    found = Predictive(model, guide=guide, num_samples=1, parallel=True)(torch.randn(M, D))
    assert found["y"].shape == (1, M, K)


def test_under_the_objective_weights_of_linear_layers_are_never_drawn() -> None:
    seen: list[UndrawnSample] = []

    def watch(module: nn.Module, inputs: Any) -> None:
        weight = module._buffers["weight"]
        assert isinstance(weight, UndrawnSample)
        seen.append(weight)

    model = network(Convolutional())
    for name in ("stem", "conv", "head"):
        model.net.get_submodule(name).register_forward_pre_hook(watch)
    guide = AdditiveNoiseGuide(model)
    TraceAnalyticKL_ELBO().loss(model, guide, torch.randn(IMAGE), labels())
    assert len(seen) == 3
    assert not any(weight.is_drawn for weight in seen)


# --- Models written by hand ---------------------------------------------------------------------


def regression(x: Tensor, y: Tensor | None = None) -> Tensor:
    w = pyro.sample("w", LogUniform().expand([D]).to_event(1))
    mean = x @ w
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)
    return mean


def regression_with_a_plate(x: Tensor, y: Tensor | None = None) -> Tensor:
    with pyro.plate("features", D):
        w = pyro.sample("w", LogUniform())
    mean = x @ w
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)
    return mean


@pytest.mark.parametrize("model", [regression, regression_with_a_plate])
def test_a_regression_written_by_hand_is_undrawn_and_has_the_exact_nll(model: Any) -> None:
    """E[-log p] in closed form; 6 standard errors: fails by chance once in 5e8 runs."""
    x, y = torch.randn(M, D), torch.randn(M)
    loc = torch.randn(D)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-1.0, init={"w": loc})
    elbo, draws = TraceAnalyticKL_ELBO(), 500
    with torch.no_grad():
        terms = [elbo.terms(model, guide, x, y) for _ in range(draws)]
    nll = torch.stack([term.nll for term in terms])
    variance = x.square() @ torch.full((D,), math.exp(-1.0))
    exact = ((y - x @ loc).square() + variance).sum() / (2 * 0.25)
    exact = exact + M * math.log(0.5 * math.sqrt(2 * math.pi))
    assert (nll.mean() - exact).abs() < 6 * nll.std() / draws**0.5
    output = torch.stack([term.output for term in terms])
    # Rows are independent under local reparameterization, and correlated under a drawn weight.
    assert ((output.var(0) / variance).log().abs() < 6 * (2 / draws) ** 0.5).all()
    correlation = torch.corrcoef(output.T) - torch.eye(M)
    assert correlation.abs().max() < 6 / draws**0.5
    elbo.differentiable_loss(model, guide, x, y).backward()
    for parameter in guide.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["dense", "convolutional", "lstm", "attention"])
@pytest.mark.parametrize("prior", [LogUniform(), dist.Normal(0.0, 1.0)], ids=["improper", "proper"])
def test_networks_learn_on_cuda(name: str, prior: Any) -> None:
    make, shape = NETWORKS[name]
    model = network(make(), prior=prior).cuda()
    guide = AdditiveNoiseGuide(model)
    x, y = torch.randn(shape).cuda(), labels().cuda()
    TraceAnalyticKL_ELBO().differentiable_loss(model, guide, x, y).backward()
    for parameter in guide.parameters():
        assert parameter.is_cuda
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


class LowRank(nn.Module):
    """The weight of the only layer is a product of a sampled factor and a constant one."""

    def __init__(self, basis: str) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1, 2))
        self.register_buffer("buffer", torch.ones(2, 50))
        self.parameter = nn.Parameter(torch.ones(2, 50))
        self.basis = basis

    def forward(self, x: Tensor) -> Tensor:
        basis = {
            "buffer": self.get_buffer("buffer"),
            "parameter": self.parameter,
            "view of a parameter": self.parameter.T.T,
        }[self.basis]
        return F.linear(x, self.theta @ basis)


@pytest.mark.parametrize("basis", ["buffer", "parameter", "view of a parameter"])
def test_a_weight_times_a_constant_is_a_weight(basis: str) -> None:
    """Its 50 entries share two draws: the output's variance is 2 * 50², not 50 * 2."""
    model = BayesianNetwork(LowRank(basis), Gaussian(), 10, where="theta")
    guide = AdditiveNoiseGuide(model, init_log_sigma2=0.0)
    x, outputs = torch.ones(1, 50), []
    for _ in range(400):
        trace = poutine.trace(LocalReparameterization()(guide)).get_trace(x)
        outputs.append(poutine.replay(model, trace)(x).item())
    # The log of a sample variance has standard error sqrt(2 / 399).
    assert abs(math.log(torch.tensor(outputs).var() / 5000)) < 6 * (2 / 399) ** 0.5


def test_num_data_may_be_an_integer_of_numpy() -> None:
    model = BayesianNetwork(nn.Linear(2, 1), Gaussian(), np.int64(64))  # type: ignore[arg-type]
    assert type(model.num_data) is int


# --- Where guides start, and nets that cannot be copied -----------------------------------------


def test_guides_start_from_what_is_given_instead_of_the_nets_own_weights() -> None:
    net = nn.Linear(D, K)
    model = network(net)
    state = model.state_dict()
    model.start_from({"weight": torch.full((K, D), 2.0)})
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double()):
        assert (each.initial_weights()["weight"] == 2).all()
        assert torch.equal(each.own_weights()["weight"].float(), net.weight)
    assert model.initial_weights()["weight"].dtype == torch.float64
    assert state.keys() == model.state_dict().keys()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "hook", [nn.utils.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 1)]
)
def test_weights_that_a_hook_computes_are_refused_with_advice(hook: Any) -> None:
    net = nn.Sequential(nn.Linear(D, D), hook(nn.Linear(D, K)))
    message = r"(?s)cannot be copied: 1\.weight is computed.*parametrizations\.weight_norm.*prune"
    with pytest.raises(TypeError, match=message):
        network(net)


def test_a_net_that_cannot_be_copied_for_reasons_of_its_own_says_them() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("never")

    with pytest.raises(RuntimeError, match="never"):
        network(Stubborn(D, K))
