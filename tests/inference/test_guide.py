"""AdditiveNoiseGuide: q(w) = N(loc, exp(log_sigma2)), an AutoGuide."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from torch import Tensor, nn

from bayes_svdo.distributions import LogUniform
from bayes_svdo.inference import AdditiveNoiseGuide, TraceAnalyticKL_ELBO
from bayes_svdo.models import BayesianNetwork, Categorical

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10) % 3


def make_net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def network(**kwargs: Any) -> BayesianNetwork:
    return BayesianNetwork(make_net(), Categorical(), num_data=10, **kwargs)


def regression(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def some_pruned(guide: AdditiveNoiseGuide, part: float = 0.5) -> AdditiveNoiseGuide:
    """Prune about a part of the weights, by their own log alpha."""
    threshold = torch.cat([v.flatten() for v in guide.log_alpha().values()]).quantile(1 - part)
    guide.prune_(float(threshold))
    return guide


# --- where it starts --------------------------------------------------------------------------


def test_starts_at_the_networks_own_weights() -> None:
    net = make_net()
    guide = AdditiveNoiseGuide(BayesianNetwork(net, Categorical(), num_data=10))
    assert guide.sites == ("0.weight", "2.weight")
    for name, median in guide.median().items():
        assert torch.equal(median, net.get_parameter(name))
        assert torch.equal(guide.parameters_of(name)[1], torch.full_like(median, -10.0))


def test_learns_copies_of_the_networks_weights() -> None:
    model = network()
    guide = AdditiveNoiseGuide(model)
    before = {name: value.clone() for name, value in model.initial_weights().items()}
    with torch.no_grad():
        for loc in guide.location_parameters():
            loc.add_(1.0)
    assert all(torch.equal(model.initial_weights()[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("sigma", "shapes"),
    [
        ("weight", [(6, 4), (3, 6)]),
        ("unit", [(6, 1), (3, 1)]),
        ("layer", [(1, 1), (1, 1)]),
    ],
)
def test_sigma_says_which_weights_share_a_variance(sigma: Any, shapes: Any) -> None:
    guide = AdditiveNoiseGuide(network(), sigma=sigma)
    assert [tuple(p.shape) for p in guide.sigma_parameters()] == shapes
    assert [tuple(p.shape) for p in guide.location_parameters()] == [(6, 4), (3, 6)]
    assert guide.parameters_of("0.weight")[1].shape == (6, 4)
    TraceAnalyticKL_ELBO().differentiable_loss(network(), guide, X, Y).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in guide.parameters())


@pytest.mark.parametrize("sigma", ["unit", "layer"])
def test_shared_variance_of_a_convolution_is_one_per_output_channel(sigma: Any) -> None:
    model = BayesianNetwork(nn.Conv2d(2, 5, 3), Categorical(), num_data=10)
    (log_sigma2,) = AdditiveNoiseGuide(model, sigma=sigma).sigma_parameters()
    assert log_sigma2.shape == (5 if sigma == "unit" else 1, 1, 1, 1)


def test_init_by_name_and_the_rest_as_usual() -> None:
    model = network()
    guide = AdditiveNoiseGuide(model, init={"2.weight": torch.ones(3, 6)})
    assert torch.equal(guide.median()["2.weight"], torch.ones(3, 6))
    assert torch.equal(guide.median()["0.weight"], model.initial_weights()["0.weight"])


def test_init_by_a_function_of_the_site() -> None:
    guide = AdditiveNoiseGuide(network(), init=lambda site: torch.zeros(site["fn"].event_shape))
    assert all(not median.any() for median in guide.median().values())


def test_hand_written_sites_start_near_zero() -> None:
    """N(0, 0.01²) for 1,000 weights: the standard deviation is within 20 % in all but 1e-18."""
    torch.manual_seed(2)

    def model() -> None:
        pyro.sample("w", LogUniform().expand([1000]).to_event(1))

    guide = AdditiveNoiseGuide(model)
    assert guide.sites == ()
    guide()
    assert guide.sites == ("w",)
    assert guide.median()["w"].std() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize(
    ("init", "error", "message"),
    [
        (
            {"2.wieght": torch.ones(3, 6)},
            ValueError,
            r'"2.wieght", which is no site.*Did you mean "2.weight"\?',
        ),
        (
            {"2.weight": torch.ones(6, 3)},
            ValueError,
            r'site "2.weight", init gives shape \(6, 3\) but the site has \(3, 6\)',
        ),
        (
            {"2.weight": torch.full((3, 6), math.nan)},
            ValueError,
            r'site "2.weight", init gives values that are not finite',
        ),
        (
            {"2.weight": torch.ones(3, 6, dtype=torch.float64)},
            TypeError,
            r'site "2.weight", init gives dtype torch.float64 but the site needs torch.float32',
        ),
        (
            {"2.weight": torch.ones(3, 6, dtype=torch.int64)},
            TypeError,
            r'site "2.weight", init gives dtype torch.int64',
        ),
    ],
)
def test_init_that_does_not_fit_is_refused(init: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        AdditiveNoiseGuide(network(), init=init)


def test_init_of_a_hand_written_model_is_checked_at_the_first_call() -> None:
    guide = AdditiveNoiseGuide(regression, init={"v": torch.zeros(4)})
    for _ in range(2):  # a failed set-up leaves nothing half done
        with pytest.raises(ValueError, match=r'init has a value for "v", which is no site'):
            guide(X, X[:, 0])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_initial_variance_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="init_log_sigma2 must be finite"):
        AdditiveNoiseGuide(network(), init_log_sigma2=value)


def test_unknown_sigma_names_the_closest() -> None:
    with pytest.raises(ValueError, match=r'unknown sigma "weights".*Did you mean "weight"\?'):
        AdditiveNoiseGuide(network(), sigma="weights")  # type: ignore[arg-type]


def test_support_other_than_the_real_line_is_refused() -> None:
    def model() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))

    with pytest.raises(NotImplementedError, match=r'(?s)site "scale".*real support.*AutoGuideList'):
        AdditiveNoiseGuide(model)()


# --- the posterior that it is -----------------------------------------------------------------


def test_samples_have_the_mean_and_variance_of_the_parameters() -> None:
    """1,000 draws of 42 weights; 6 standard errors: fails by chance once in 1e7 seeds."""
    torch.manual_seed(3)
    guide = AdditiveNoiseGuide(network(), init_log_sigma2=-2.0)
    draws = [guide() for _ in range(1000)]
    for name in guide.sites:
        loc, log_sigma2 = guide.parameters_of(name)
        values = torch.stack([draw[name] for draw in draws])
        sigma = (0.5 * log_sigma2).exp()
        assert ((values.mean(0) - loc).abs() < 6 * sigma / math.sqrt(1000)).all()
        assert ((values.std(0) / sigma - 1).abs() < 6 / math.sqrt(2 * 1000)).all()


def test_quantiles_are_those_of_a_normal() -> None:
    guide = AdditiveNoiseGuide(network(), init_log_sigma2=-2.0)
    quantiles = guide.quantiles([0.025, 0.5, 0.975])
    for name, median in guide.median().items():
        assert quantiles[name].shape == (3, *median.shape)
        torch.testing.assert_close(quantiles[name][1], median)
        width = quantiles[name][2] - quantiles[name][0]
        torch.testing.assert_close(width, torch.full_like(width, 2 * 1.959964 * math.exp(-1.0)))


def test_log_alpha_is_that_of_the_parameters() -> None:
    guide = AdditiveNoiseGuide(network(), init_log_sigma2=-3.0)
    for name, value in guide.log_alpha().items():
        expected = -3.0 - guide.median()[name].square().log()
        torch.testing.assert_close(value, expected)
        assert not value.requires_grad


# --- pruning ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.5, 0.95])
def test_pruned_weights_are_zero_for_good(part: float) -> None:
    torch.manual_seed(4)
    guide = AdditiveNoiseGuide(network(), init_log_sigma2=-2.0)
    before = guide.log_alpha()
    threshold = float(torch.cat([v.flatten() for v in before.values()]).quantile(1 - part))
    guide.prune_(threshold)
    for name in guide.sites:
        gone = before[name] >= threshold
        assert gone.any()
        assert (guide.median()[name][gone] == 0).all()
        assert (guide.log_alpha()[name][gone] == math.inf).all()
        assert torch.equal(guide.log_alpha()[name][~gone], before[name][~gone])
        assert (guide()[name][gone].abs() < 1e-10).all()  # sigma = e^-30
    with torch.no_grad():
        for parameter in guide.sigma_parameters():
            parameter.fill_(-20.0)  # the data want them back
    guide.prune_(math.inf)
    for name in guide.sites:
        assert (guide.median()[name][before[name] >= threshold] == 0).all()


@pytest.mark.parametrize("part", [0.5, 0.95])
def test_pruned_weights_have_no_gradient_and_no_divergence(part: float) -> None:
    torch.manual_seed(5)
    model = network()
    guide = some_pruned(AdditiveNoiseGuide(model, init_log_sigma2=-2.0), part)
    terms = TraceAnalyticKL_ELBO().terms(model, guide, X, Y)
    terms.loss().backward()
    for name in guide.sites:
        gone = guide.log_alpha()[name] == math.inf
        loc = guide.loc.get_parameter(name + "_unconstrained")
        log_sigma2 = guide.log_sigma2.get_parameter(name + "_unconstrained")
        assert (loc.grad[gone] == 0).all()
        assert (log_sigma2.grad[gone].abs() < 1e-9).all()
        assert (loc.grad[~gone] != 0).any()
        kept = LogUniform().kl_from(guide.log_alpha()[name][~gone]).sum()
        torch.testing.assert_close(terms.kl[name].detach(), kept)


def test_blocks_shrink_when_half_of_what_they_hold_is_dead() -> None:
    """Each change of the layout costs a compiled objective; in between masks do."""
    guide = AdditiveNoiseGuide(network(), init_log_sigma2=-20.0)
    rows = len(guide.log_sigma2.get_parameter("0.weight_unconstrained"))
    layouts = []
    for dead in range(rows + 1):
        with torch.no_grad():
            guide.log_sigma2.get_parameter("0.weight_unconstrained")[:dead] = 20.0
            guide.log_sigma2.get_parameter("2.weight_unconstrained")[:, :dead] = 20.0
        guide.prune_(3.0)
        assert (guide.median()["0.weight"][:dead] == 0).all()
        assert guide.median()["0.weight"][dead:].all()
        layouts.append(guide.layout)
    changes = sum(a != b for a, b in itertools.pairwise(layouts))
    assert 1 <= changes <= math.log2(rows) + 1
    assert layouts[0] == 1  # from no masks to masks


def test_everything_pruned_leaves_the_biases() -> None:
    model = network()
    guide = AdditiveNoiseGuide(model)
    guide.prune_(-math.inf)
    terms = TraceAnalyticKL_ELBO().terms(model, guide, X, Y)
    terms.loss().backward()
    torch.testing.assert_close(terms.output, model.net[2].bias.expand(10, 3))
    assert float(terms.total_kl().detach()) == pytest.approx(0.0, abs=1e-6)
    assert all(p.grad is None or p.grad.isfinite().all() for p in guide.parameters())


def test_not_a_number_is_not_pruned_but_refused() -> None:
    guide = AdditiveNoiseGuide(network())
    with torch.no_grad():
        guide.location_parameters()[0][0, 0] = math.nan
    with pytest.raises(ValueError, match=r'site "0.weight", 1 log alpha are NaN'):
        guide.prune_(-math.inf)
    assert guide.median()["2.weight"].all()  # nothing was pruned


def test_pruned_guide_moves_between_dtypes() -> None:
    """Blocks of kept weights are no buffers; they follow all the same."""
    model = network()
    guide = some_pruned(AdditiveNoiseGuide(model), 0.95)
    loss = TraceAnalyticKL_ELBO().differentiable_loss(model.double(), guide.double(), X.double(), Y)
    assert loss.dtype == torch.float64


# --- a module ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0.0, 0.5, 0.95])
def test_state_dict_round_trips_with_what_was_pruned(part: float) -> None:
    guide = AdditiveNoiseGuide(network(), init_log_sigma2=-2.0)
    if part:
        some_pruned(guide, part)
    other = AdditiveNoiseGuide(network(), init=lambda site: torch.ones(site["fn"].event_shape))
    other.load_state_dict(guide.state_dict())
    assert_same_posterior(other, guide)


def assert_same_posterior(one: AdditiveNoiseGuide, other: AdditiveNoiseGuide) -> None:
    assert one.sites == other.sites
    for name in one.sites:
        assert torch.equal(one.log_alpha()[name], other.log_alpha()[name])
        for a, b in zip(one.parameters_of(name), other.parameters_of(name), strict=True):
            assert torch.equal(a, b)


def test_a_copy_is_independent_and_leaves_the_original_usable() -> None:
    guide = some_pruned(AdditiveNoiseGuide(network(), init_log_sigma2=-2.0))
    copy = deepcopy(guide)
    assert_same_posterior(copy, guide)
    with torch.no_grad():
        copy.location_parameters()[0].add_(1.0)
    copy.prune_(-math.inf)
    assert guide.median()["0.weight"].any()
    assert torch.equal(guide()["0.weight"] == 0, guide()["0.weight"] == 0)
    assert isinstance(guide.model, Callable)  # type: ignore[arg-type]


def test_original_of_a_copy_can_still_be_set_up() -> None:
    guide = AdditiveNoiseGuide(regression)
    copy = deepcopy(guide)
    guide(X, X[:, 0])
    assert guide.sites == ("w",)
    with pytest.raises(RuntimeError, match=r"(?s)is a copy, and has no model.*copy_for"):
        copy(X, X[:, 0])


def test_copy_for_a_model_leaves_the_original_as_it_is() -> None:
    guide = AdditiveNoiseGuide(regression, init={"w": torch.ones(4)})
    copy = guide.copy_for(regression)
    copy(X, X[:, 0])
    assert torch.equal(copy.median()["w"], torch.ones(4))
    assert guide.sites == ()


# --- Pyro's protocol --------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_from_the_guide(parallel: bool) -> None:
    model = network()
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-4.0)
    samples = Predictive(model, guide=guide, num_samples=7, parallel=parallel)(X)
    assert samples["y"].shape == (7, 10)
    samples = Predictive(
        model, guide=guide, num_samples=7, parallel=parallel, return_sites=("0.weight", "_RETURN")
    )(X)
    assert samples["0.weight"].shape[0] == 7
    assert samples["0.weight"].shape[-2:] == (6, 4)
    assert samples["_RETURN"].shape == (7, 10, 3)
    assert samples["0.weight"].std(0).max() > 0


def test_predictive_of_a_hand_written_model() -> None:
    """Predictive runs the model once on its own; ``guide.model`` gives it weights to run with."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    guide = AdditiveNoiseGuide(model, init={"w": torch.zeros(4)}, init_log_sigma2=-20.0)
    guide(X, X[:, 0])
    with torch.no_grad():
        guide.location_parameters()[0].fill_(1.0)
    predictive = Predictive(guide.model, guide=guide, num_samples=500)
    samples = predictive(X)
    assert samples["y"].shape == (500, 10)
    # 6 standard errors of noise 1: fails by chance once in 5e7 seeds.
    torch.testing.assert_close(samples["y"].mean(0), X.sum(1), atol=6 / 500**0.5, rtol=0)


def test_is_a_part_of_a_list_of_guides() -> None:
    """Weights of ours beside a scale of Pyro's; the base model needs a value for the weights."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", LogUniform().expand([4]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, scale), obs=y)

    torch.manual_seed(6)
    start = InitMessenger(init_to_value(values={"w": torch.zeros(4), "scale": torch.tensor(1.0)}))
    base = start(model)
    guide = AutoGuideList(base)
    guide.append(AdditiveNoiseGuide(poutine.block(base, expose=["w"]), init_log_sigma2=-4.0))
    guide.append(AutoNormal(poutine.block(base, hide=["w"])))
    y = X @ torch.tensor([2.0, 0.0, 0.0, -2.0])
    guide(X, y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceAnalyticKL_ELBO())
    losses = [svi.step(X, y) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert set(guide.median()) == {"w", "scale"}
    torch.testing.assert_close(
        guide.median()["w"], torch.tensor([2.0, 0.0, 0.0, -2.0]), atol=0.5, rtol=0
    )


def test_local_latents_in_a_subsampled_plate_are_learned_in_full() -> None:
    rows = torch.arange(3)

    def model() -> None:
        with pyro.plate("data", 8, subsample=rows):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(3))

    guide = AdditiveNoiseGuide(model, create_plates=lambda: pyro.plate("data", 8, subsample=rows))
    assert guide()["z"].shape == (3, 2)
    assert guide.median()["z"].shape == (8, 2)
    guide.prune_(math.inf)
    elbo = TraceAnalyticKL_ELBO(local_reparameterization=False)
    torch.manual_seed(7)
    loss = elbo.differentiable_loss(model, guide)
    torch.manual_seed(7)
    torch.testing.assert_close(loss, TraceMeanField_ELBO().differentiable_loss(model, guide))


def test_scalar_site_of_a_hand_written_model() -> None:
    def model() -> None:
        pyro.sample("slope", LogUniform())

    guide = AdditiveNoiseGuide(model, sigma="unit")
    assert guide()["slope"].shape == ()
    assert guide.quantiles([0.1, 0.9])["slope"].shape == (2,)


def test_model_with_sequential_plates_is_refused_by_pyro() -> None:
    def model() -> None:
        for i in pyro.plate("steps", 2):
            pyro.sample(f"w{i}", LogUniform())

    with pytest.raises(NotImplementedError, match="sequential"):
        AdditiveNoiseGuide(model)()


@pytest.mark.cuda
def test_pruned_guide_moves_to_a_gpu() -> None:
    model = network()
    guide = some_pruned(AdditiveNoiseGuide(model, init_log_sigma2=-60.0), 0.95)
    here = TraceAnalyticKL_ELBO().terms(model, guide, X, Y).output
    there = TraceAnalyticKL_ELBO().terms(model.cuda(), guide.cuda(), X.cuda(), Y.cuda()).output
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)


# --- which sites are pruned ---------------------------------------------------------------------


def offset_regression(x: Tensor, y: Tensor | None = None) -> None:
    """An offset under a proper prior, beside weights under an improper one."""
    w = pyro.sample("w", LogUniform().expand([4]).mask(True).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w + b, 1.0), obs=y)


def test_sites_under_a_proper_prior_are_never_pruned() -> None:
    guide = AdditiveNoiseGuide(offset_regression, init_log_sigma2=0.0)
    assert guide.prunable_sites == ()  # nothing is known yet
    guide(X, X[:, 0])
    assert guide.prunable_sites == ("w",)
    assert all((value > 3).all() for value in guide.log_alpha().values())
    pruned = guide.is_pruned(3.0)
    assert pruned["w"].all()
    assert not pruned["b"].any()
    guide.prune_(3.0)
    median = guide.median()
    assert (median["w"] == 0).all()
    assert (median["b"] != 0).all()
    assert guide.log_alpha()["b"].isfinite()
    assert guide.is_pruned(math.inf)["w"].all()  # for good


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (None, {}, "model must be a BayesianNetwork or a Pyro model, but is None"),
        (print, {"init": "zeros"}, r"(?s)init must be a mapping .* but is 'zeros'.*Try init=\{"),
        (print, {"init_log_sigma2": "-10"}, "init_log_sigma2 must be a number, but is '-10'"),
        (print, {"init_log_sigma2": None}, "init_log_sigma2 must be a number, but is None"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(model: Any, arguments: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        AdditiveNoiseGuide(model, **arguments)
