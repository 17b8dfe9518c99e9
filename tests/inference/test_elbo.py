"""TraceAnalyticKL_ELBO is Pyro's TraceMeanField_ELBO, with less noise and less work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from bayes_svdo.distributions import EmpiricalBayes, LogUniform
from bayes_svdo.inference import AdditiveNoiseGuide, TraceAnalyticKL_ELBO
from bayes_svdo.models import BayesianNetwork, Categorical, Gaussian

# Two sums of the same float64 terms in another order.
ROUNDING = 1e-11

X = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10) % 3
Drawing = partial(TraceAnalyticKL_ELBO, local_reparameterization=False)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class TiedNet(nn.Module):
    """One weight at work twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def network(prior: Any = None, net: nn.Module | None = None) -> BayesianNetwork:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)) if net is None else net
    return BayesianNetwork(net.double(), Categorical(), num_data=50, prior=prior)


def loss_and_gradients(elbo: Any, model: Any, guide: Any, *args: Any, seed: int = 2) -> Any:
    parameters = [*guide.parameters(), *(model.parameters() if hasattr(model, "net") else ())]
    for parameter in parameters:
        parameter.grad = None
    torch.manual_seed(seed)
    loss = elbo.differentiable_loss(model, guide, *args)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in parameters]


def assert_same_objective(ours: Any, stock: Any, model: Any, guide: Any, *args: Any) -> None:
    loss, gradients = loss_and_gradients(ours, model, guide, *args)
    expected, expected_gradients = loss_and_gradients(stock, model, guide, *args)
    torch.testing.assert_close(loss, expected, rtol=ROUNDING, atol=ROUNDING)
    torch.testing.assert_close(gradients, expected_gradients, rtol=ROUNDING, atol=ROUNDING)


PRIORS = {
    "molchanov2017": LogUniform(),
    "exact": LogUniform("exact"),
    "normal": dist.Normal(0.0, 1.0),
    "laplace": dist.Laplace(0.0, 1.0),  # no KL from a Gaussian is registered
    "student": dist.StudentT(4.0),  # nor here
}


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
def test_value_and_gradient_are_those_of_the_stock_objective_for_the_same_draw(prior: Any) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", prior.expand([4, 3]).to_event(2))
        with pyro.plate("data", 50, subsample=torch.arange(len(x))):
            pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)

    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    guide(X, Y)
    assert_same_objective(Drawing(), TraceMeanField_ELBO(), model, guide, X, Y)


@pytest.mark.parametrize("kl", ["molchanov2017", "exact", "poster2016"])
def test_objective_of_a_network_is_the_stock_one_for_the_same_draw(kl: Any) -> None:
    model = network(LogUniform(kl))
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    assert_same_objective(Drawing(), TraceMeanField_ELBO(), model, guide, X, Y)


@pytest.mark.parametrize("vectorize", [False, True])
def test_several_particles_are_those_of_the_stock_objective(vectorize: bool) -> None:
    model = network(LogUniform())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    settings = {"num_particles": 3, "vectorize_particles": vectorize, "max_plate_nesting": 1}
    assert_same_objective(Drawing(**settings), TraceMeanField_ELBO(**settings), model, guide, X, Y)


def test_vectorised_particles_find_their_plates() -> None:
    model = network(LogUniform())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    elbo = TraceAnalyticKL_ELBO(num_particles=3, vectorize_particles=True)
    terms = elbo.terms(model, guide, X, Y)
    assert terms.output.shape == (3, 10, 3)
    one = TraceAnalyticKL_ELBO().terms(model, guide, X, Y)
    torch.testing.assert_close(terms.kl, one.kl, rtol=ROUNDING, atol=ROUNDING)


def test_looped_particles_are_the_mean_of_single_ones() -> None:
    model = network(LogUniform())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    torch.manual_seed(3)
    single = [TraceAnalyticKL_ELBO().terms(model, guide, X, Y) for _ in range(3)]
    torch.manual_seed(3)
    terms = TraceAnalyticKL_ELBO(num_particles=3).terms(model, guide, X, Y)
    torch.testing.assert_close(terms.nll, sum(t.nll for t in single) / 3)
    for name, kl in terms.kl.items():
        torch.testing.assert_close(kl, sum(t.kl[name] for t in single) / 3)


# --- local reparameterization -----------------------------------------------------------------


def regression(num_data: int) -> tuple[BayesianNetwork, AdditiveNoiseGuide]:
    torch.manual_seed(4)
    model = BayesianNetwork(nn.Linear(4, 1).double(), Gaussian(0.5), num_data=num_data)
    return model, AdditiveNoiseGuide(model, init_log_sigma2=-1.0)


def closed_form_nll(model: BayesianNetwork, guide: AdditiveNoiseGuide, y: Tensor) -> Tensor:
    """E_q[-log N(y; x w + b, 0.5²)], shape (n, 1)."""
    loc, log_sigma2 = guide.parameters_of("weight")
    mean = X @ loc.T + model.net.bias
    variance = X.square() @ log_sigma2.exp().T
    return ((y - mean).square() + variance) / 0.5 + 0.5 * math.log(2 * math.pi * 0.25)


@torch.no_grad()
def test_local_reparameterization_has_the_expectation_of_the_objective() -> None:
    """5 standard errors: fails by chance once in 2e6 seeds."""
    repeats = 4000  # each row of the input has noise of its own
    model, guide = regression(num_data=10 * repeats)
    y = torch.linspace(-1, 1, 10, dtype=torch.float64)[:, None]
    torch.manual_seed(5)
    x_many, y_many = X.repeat(repeats, 1), y.repeat(repeats, 1)
    terms = TraceAnalyticKL_ELBO().terms(model, guide, x_many, y_many)
    each = (y_many - terms.output).square() / 0.5
    standard_error = float(each.std()) * math.sqrt(len(each))
    expected = float(closed_form_nll(model, guide, y).sum()) * repeats
    assert abs(float(terms.nll) - expected) < 5 * standard_error


@torch.no_grad()
def test_drawn_weights_have_the_expectation_of_the_objective() -> None:
    """5 standard errors: fails by chance once in 2e6 seeds."""
    model, guide = regression(num_data=10)
    y = torch.linspace(-1, 1, 10, dtype=torch.float64)[:, None]
    torch.manual_seed(6)
    elbo = Drawing(num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    terms = elbo.terms(model, guide, X, y)
    draws = (y - terms.output).square().sum((1, 2)) / 0.5
    standard_error = float(draws.std()) / math.sqrt(len(draws))
    expected = float(closed_form_nll(model, guide, y).sum())
    assert abs(float(terms.nll) - expected) < 5 * standard_error


@torch.no_grad()
def test_local_reparameterization_has_less_variance() -> None:
    """The ratio is near 5 here; over 100 passes each it falls below 1 in none of 1e6 seeds."""
    model, guide = regression(num_data=10)
    y = torch.zeros(10, 1, dtype=torch.float64)
    torch.manual_seed(7)
    variance = {
        local: torch.stack(
            [
                TraceAnalyticKL_ELBO(local_reparameterization=local).terms(model, guide, X, y).nll
                for _ in range(100)
            ]
        ).var()
        for local in (True, False)
    }
    assert variance[True] < variance[False]


def test_local_reparameterization_can_be_switched_off() -> None:
    model, guide = regression(num_data=10)
    output = Drawing().terms(model, guide, X[:1].repeat(10, 1), torch.zeros(10, 1)).output
    torch.testing.assert_close(output, output[:1].expand(10, 1))  # one weight for all rows


def test_weight_used_twice_is_drawn_once() -> None:
    model = network(net=TiedNet())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    elbo = TraceAnalyticKL_ELBO()
    elbo.terms(model, guide, X, Y)  # finds out
    assert_same_objective(elbo, TraceMeanField_ELBO(), model, guide, X, Y)


def test_what_was_learned_of_reuse_can_be_forgotten() -> None:
    model = network(net=TiedNet())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    elbo = TraceAnalyticKL_ELBO()
    losses = []
    for _ in range(2):
        torch.manual_seed(8)
        losses.append(elbo.differentiable_loss(model, guide, X, Y))
        elbo.forget_reuse()
    assert losses[0] == losses[1]


def test_named_weights_are_drawn() -> None:
    model, guide = regression(num_data=10)
    elbo = TraceAnalyticKL_ELBO(drawn="weight")
    output = elbo.terms(model, guide, X[:1].repeat(10, 1), torch.zeros(10, 1)).output
    torch.testing.assert_close(output, output[:1].expand(10, 1))  # one weight for all rows
    elbo.forget_reuse()
    assert elbo.drawn == {"weight"}


@pytest.mark.parametrize("local", [True, False])
def test_a_name_to_draw_that_is_no_site_is_refused(local: bool) -> None:
    model, guide = regression(num_data=10)
    elbo = TraceAnalyticKL_ELBO(drawn={"wieght"}, local_reparameterization=local)
    with pytest.raises(ValueError, match=r'drawn names "wieght".*Did you mean "weight".*: weight'):
        elbo.loss(model, guide, X, torch.zeros(10, 1))


class PooledConvolution(nn.Module):
    """One weight of 9 entries, at 36 positions of an image, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, 1, 8, 8)).mean((2, 3))


@torch.no_grad()
@pytest.mark.parametrize(
    ("net", "positions"), [(nn.Linear(9, 1, bias=False), 1), (PooledConvolution(), 36)]
)
def test_local_reparameterization_drops_the_dependence_between_positions(
    net: nn.Module, positions: int
) -> None:
    """5 standard errors: fails by chance once in 2e6 seeds.

    The output is N(0, 9) for every data point, and 9 / positions where they have noise of their
    own: the same for a dense layer, less, and so a smaller loss, for a convolution.
    """
    n, particles = 8, 300
    model = BayesianNetwork(net.double(), Gaussian(1.0), num_data=n)
    init = {name: torch.zeros_like(value) for name, value in model.initial_weights().items()}
    guide = AdditiveNoiseGuide(model, init_log_sigma2=0.0, init=init)
    x, y = torch.ones(n, 9 if positions == 1 else 64), torch.zeros(n, 1)
    torch.manual_seed(9)
    for local, variance in ((True, 9 / positions), (False, 9.0)):
        elbo = TraceAnalyticKL_ELBO(local_reparameterization=local, num_particles=particles)
        expected = n * 0.5 * (math.log(2 * math.pi) + variance)
        # Squares of a normal variable: of one for each point, or of one for all of them.
        error = variance / 2 * math.sqrt(2 * n * (1 if local else n) / particles)
        assert abs(float(elbo.terms(model, guide, x, y).nll) - expected) < 5 * error


def test_independent_noise_at_each_use_is_had_on_request() -> None:
    model = network(net=TiedNet())
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    same = X[:1].repeat(10, 1)
    output = TraceAnalyticKL_ELBO(reuse="independent").terms(model, guide, same, Y).output
    assert not torch.allclose(output, output[:1].expand_as(output))  # rows have noise of their own


# --- terms ------------------------------------------------------------------------------------


def test_terms_are_the_loss_taken_apart() -> None:
    model = network()
    guide = AdditiveNoiseGuide(model)
    torch.manual_seed(9)
    terms = TraceAnalyticKL_ELBO().terms(model, guide, X, Y)
    torch.manual_seed(9)
    loss = TraceAnalyticKL_ELBO(kl_weight=0.25).loss(model, guide, X, Y)
    assert set(terms.kl) == {"0.weight", "2.weight"}
    assert set(terms.observed) == {"y"}
    assert terms.output.shape == (10, 3)
    expected = (terms.nll + 0.25 * sum(terms.kl.values())).detach()
    assert loss == pytest.approx(float(expected), rel=ROUNDING)
    assert float(terms.loss(0.25).detach()) == pytest.approx(loss, rel=ROUNDING)


def test_likelihood_stands_for_all_of_the_data() -> None:
    model = network()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-60.0)
    nll = TraceAnalyticKL_ELBO().terms(model, guide, X, Y).nll
    mean = nn.functional.cross_entropy(model.net(X), Y)
    torch.testing.assert_close(nll, 50 * mean, rtol=1e-9, atol=0)  # noise of e^-30 is left


@pytest.mark.parametrize("prior", [LogUniform(), dist.Laplace(0.0, 1.0)], ids=["KL", "draws"])
def test_kl_weight_scales_model_and_guide_alike(prior: Any) -> None:
    """As ``poutine.scale`` around the latent site of both does, with an analytic KL or without."""

    def model(x: Tensor, y: Tensor, weight: float = 0.3) -> None:
        with poutine.scale(scale=weight):
            w = pyro.sample("w", prior.expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    inner = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    inner(X, X[:, 0])

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, y: Tensor, weight: float = 0.3) -> Any:
            with poutine.scale(scale=weight):
                return self.inner(x, y)

    scaled = loss_and_gradients(TraceMeanField_ELBO(), model, Scaled(), X, X[:, 0])
    weighted = loss_and_gradients(Drawing(kl_weight=0.3), model, Scaled(), X, X[:, 0], 1.0)
    torch.testing.assert_close(weighted, scaled, rtol=ROUNDING, atol=ROUNDING)


def test_kl_weight_may_be_a_tensor_that_changes() -> None:
    model = network()
    guide = AdditiveNoiseGuide(model)
    weight = torch.zeros(())
    elbo = TraceAnalyticKL_ELBO(kl_weight=weight)
    terms = elbo.terms(model, guide, X, Y)
    losses = []
    for value in (0.0, 1.0):
        weight.fill_(value)
        torch.manual_seed(10)
        losses.append(elbo.loss(model, guide, X, Y))
    assert losses[1] - losses[0] == pytest.approx(float(terms.total_kl().detach()), rel=1e-9)


@pytest.mark.parametrize("kl_weight", [-0.1, math.inf, math.nan])
def test_kl_weight_that_is_no_weight_is_refused(kl_weight: float) -> None:
    with pytest.raises(ValueError, match="kl_weight must be finite and not negative"):
        TraceAnalyticKL_ELBO(kl_weight=kl_weight)


def test_model_without_data_has_a_kl_alone() -> None:
    def model() -> None:
        pyro.sample("w", LogUniform().expand([3]).to_event(1))

    guide = AdditiveNoiseGuide(model)
    terms = TraceAnalyticKL_ELBO().terms(model, guide)
    assert terms.nll == 0.0
    assert terms.loss() == terms.kl["w"] > 0


def test_empirical_bayes_prior_needs_no_density() -> None:
    model = network(EmpiricalBayes())
    terms = TraceAnalyticKL_ELBO().terms(model, AdditiveNoiseGuide(model), X, Y)
    assert all(kl > 0 for kl in terms.kl.values())


# --- hand-written models ----------------------------------------------------------------------


def sparse_regression(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def masked(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
    with pyro.plate("data", len(x)), poutine.mask(mask=y > 0):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def scaled(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
    with poutine.scale(scale=7.0), pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def two_outcomes(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)
        pyro.sample("z", dist.Normal(x.sum(1) * w.sum(), 2.0), obs=y)


def subsampled(x: Tensor, y: Tensor) -> None:
    w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
    with pyro.plate("data", 40, subsample=torch.arange(len(x))):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def in_a_plate(x: Tensor, y: Tensor) -> None:
    with pyro.plate("features", 4):
        w = pyro.sample("w", LogUniform())
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


MODELS = [sparse_regression, masked, scaled, two_outcomes, subsampled, in_a_plate]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_hand_written_models_have_the_stock_objective(model: Callable[..., None]) -> None:
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-2.0)
    guide(X, X[:, 0])
    assert_same_objective(Drawing(), TraceMeanField_ELBO(), model, guide, X, X[:, 0])


def test_nll_is_readable_per_observed_site() -> None:
    guide = AdditiveNoiseGuide(two_outcomes)
    guide(X, X[:, 0])
    terms = TraceAnalyticKL_ELBO().terms(two_outcomes, guide, X, X[:, 0])
    assert set(terms.observed) == {"y", "z"}
    assert terms.nll == terms.observed["y"] + terms.observed["z"]


def test_auxiliary_sites_of_the_guide_count_as_in_the_stock_objective() -> None:
    loc = torch.zeros(4, dtype=torch.float64, requires_grad=True)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(loc)

        def forward(self, x: Tensor, y: Tensor) -> None:
            shift = pyro.sample(
                "shift", dist.Normal(self.loc, 0.5).to_event(1), infer={"is_auxiliary": True}
            )
            pyro.sample("w", dist.Normal(shift, 1.0).to_event(1))

    assert_same_objective(Drawing(), TraceMeanField_ELBO(), sparse_regression, Guide(), X, X[:, 0])


def test_site_of_the_guide_alone_must_be_marked_as_auxiliary() -> None:
    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("stray", dist.Normal(0.0, 1.0))

    elbo = TraceAnalyticKL_ELBO()
    with (
        pytest.warns(UserWarning, match="stray"),
        pytest.raises(ValueError, match='site "stray", but the model does not'),
    ):
        elbo.terms(sparse_regression, guide, X, X[:, 0])


def test_site_that_the_guide_lacks_is_an_error() -> None:
    def model() -> None:
        pyro.sample("forgotten", dist.Normal(0.0, 1.0))

    def guide() -> None:
        pass

    with (
        pytest.warns(UserWarning, match="forgotten"),
        pytest.raises(ValueError, match='samples site "forgotten", but the guide does not'),
    ):
        TraceAnalyticKL_ELBO().terms(model, guide)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_draws_without_a_gradient_are_refused(auxiliary: bool) -> None:
    name = "coin" if auxiliary else "z"

    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0) if auxiliary else dist.Bernoulli(0.5))

    def guide() -> None:
        pyro.sample(name, dist.Bernoulli(0.3), infer={"is_auxiliary": auxiliary})
        if auxiliary:
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(NotImplementedError, match=f'site "{name}".*not reparameterized'):
        TraceAnalyticKL_ELBO().terms(model, guide)


def test_guide_outside_of_the_models_plate_is_refused() -> None:
    def model() -> None:
        with pyro.plate("features", 4):
            pyro.sample("w", LogUniform())

    def guide() -> None:
        pyro.sample("w", dist.Normal(torch.zeros(1), 1.0))

    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match=r'site "w", the guide has batch shape \(1,\).*\(4,\)'),
    ):
        TraceAnalyticKL_ELBO().terms(model, guide)


# --- Pyro's own interfaces ----------------------------------------------------------------------


@pytest.mark.parametrize("elbo", [TraceAnalyticKL_ELBO, TraceMeanField_ELBO, Trace_ELBO])
def test_svi_fits_with_this_and_with_the_stock_objectives(elbo: Any) -> None:
    """Over 300 steps the loss falls by some 70 nats, 20 standard deviations of its noise."""
    torch.manual_seed(11)
    true = torch.tensor([3.0, 0.0, -2.0, 0.0], dtype=torch.float64)
    y = X @ true
    guide = AdditiveNoiseGuide(sparse_regression, init_log_sigma2=-4.0)
    svi = SVI(sparse_regression, guide, pyro.optim.Adam({"lr": 0.03}), elbo())
    before = svi.evaluate_loss(X, y)
    for _ in range(300):
        svi.step(X, y)
    assert svi.evaluate_loss(X, y) < before - 20
    torch.testing.assert_close(guide.median()["w"], true, atol=1.0, rtol=0)


def test_the_objective_of_modules_is_a_module() -> None:
    model = network()
    guide = AdditiveNoiseGuide(model)
    module = TraceAnalyticKL_ELBO()(model, guide)
    module(X, Y).backward()
    named = dict(module.named_parameters())
    assert "guide.loc.0.weight_unconstrained" in named
    assert all(parameter.grad is not None for parameter in named.values())


def test_not_a_number_is_warned_of() -> None:
    guide = AdditiveNoiseGuide(sparse_regression)
    guide(X, X[:, 0])
    with pytest.warns(UserWarning, match="loss"), pyro.validation_enabled(False):
        loss = TraceAnalyticKL_ELBO().loss(sparse_regression, guide, X, X[:, 0] * math.nan)
    assert math.isnan(loss)


def test_gradients_add_up_over_calls() -> None:
    model = network()
    guide = AdditiveNoiseGuide(model)
    elbo = TraceAnalyticKL_ELBO()
    torch.manual_seed(12)
    elbo.loss_and_grads(model, guide, X, Y)
    once = [p.grad.clone() for p in guide.parameters()]
    torch.manual_seed(12)
    elbo.loss_and_grads(model, guide, X, Y)
    torch.testing.assert_close([p.grad for p in guide.parameters()], [2 * g for g in once])


@pytest.mark.cuda
def test_the_objective_is_the_same_on_a_gpu() -> None:
    """Noise of e^-30 leaves nothing random."""
    model = network()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-60.0)
    here = TraceAnalyticKL_ELBO().terms(model, guide, X, Y)
    there = TraceAnalyticKL_ELBO().terms(model.cuda(), guide.cuda(), X.cuda(), Y.cuda())
    assert there.nll.is_cuda
    torch.testing.assert_close(there.nll.cpu(), here.nll, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        {name: kl.cpu() for name, kl in there.kl.items()}, here.kl, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_particles": 0}, ValueError, "num_particles must be an integer of at least 1"),
        ({"num_particles": 1.5}, ValueError, "num_particles must be an integer .*but is 1.5"),
        ({"kl_weight": "1"}, TypeError, "kl_weight must be a number or a scalar .*but is '1'"),
        ({"kl_weight": torch.tensor(-1.0)}, ValueError, "kl_weight must be finite and not"),
    ],
)
def test_arguments_that_cannot_be_are_named(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        TraceAnalyticKL_ELBO(**arguments)
