"""Predictive distributions: from a posterior to what it predicts."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayes_svdo.analysis import ClassificationPredictive, RegressionPredictive, predictive
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior
from bayes_svdo.models import BayesianNetwork, Bernoulli, Categorical, Gaussian
from bayes_svdo.models.likelihoods import Likelihood

METHODS = ("local", "weights", "moments")
N = 7


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def posterior_of(net: nn.Module, likelihood: Likelihood, log_sigma2: float = -1.0) -> Posterior:
    model = BayesianNetwork(net, likelihood, num_data=N)
    return Posterior(model, AdditiveNoiseGuide(model, init_log_sigma2=log_sigma2))


def one_hidden(outputs: int, hidden: int = 8) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class LastOutput(nn.Module):
    """A recurrent net, whose weights are drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(2, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


class Twice(nn.Module):
    """A weight that is used twice, and has one draw."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) - self.fc(x)


class Poisson(Likelihood):
    metric, higher_is_better = "deviance", False

    def distribution(self, output):
        return dist.Poisson(output.exp())

    def score(self, output, y):
        return output

    def check(self, y, output, name):
        pass


# The three methods say the same.


def test_the_methods_agree_on_a_regression():
    """Exact for one hidden layer, so draws differ by their own error; 5 standard errors of 42."""
    posterior, draws = posterior_of(one_hidden(3), Gaussian(0.5)), 1000
    x = inputs(N, 4)
    exact = predictive(posterior, x, method="moments")
    for method in ("local", "weights"):
        result = predictive(posterior, x, draws, method, seed=1)
        error = (exact.epistemic_variance / draws).sqrt()
        assert ((result.mean - exact.mean).abs() < 5 * error).all()
        centred = (result.component_means - result.mean).square()
        error = centred.std(0) / math.sqrt(draws)
        assert ((result.epistemic_variance - exact.epistemic_variance).abs() < 5 * error).all()
        torch.testing.assert_close(result.aleatoric_variance, exact.aleatoric_variance)


def test_the_methods_agree_on_a_linear_classifier():
    """Its logits are Gaussian and independent, as moments take them to be."""
    torch.manual_seed(1)
    posterior, draws = posterior_of(nn.Linear(4, 3), Categorical()), 1000
    x = inputs(N, 4)
    results = [predictive(posterior, x, draws, method, seed=2) for method in METHODS]
    for result in results[1:]:
        error = math.sqrt(0.5 / draws)  # sd of a probability is below 1/2, of both draws
        assert (result.probabilities - results[0].probabilities).abs().max() < 5 * error
        difference = result.expected_entropy - results[0].expected_entropy
        assert difference.abs().max() < 5 * error * math.log(3)


def test_a_linear_regression_has_its_closed_form():
    torch.manual_seed(1)
    posterior = posterior_of(nn.Linear(4, 1), Gaussian(0.5))
    x = inputs(N, 4)
    expected = (x.square().sum(1, keepdim=True) * math.exp(-1)).double()
    result = predictive(posterior, x, method="moments")
    torch.testing.assert_close(result.epistemic_variance, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.mean.float(), posterior.predict(x, threshold=math.inf))
    assert float(result.aleatoric_variance.max()) == pytest.approx(0.25)
    normal = stats.norm(result.mean.numpy(), np.sqrt(expected.numpy() + 0.25))
    np.testing.assert_allclose(result.quantile(0.9), normal.ppf(0.9), rtol=1e-5)


def test_deeper_networks_are_approximated_by_moments():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 3))
    posterior = posterior_of(net, Categorical(), log_sigma2=-4.0)
    x = inputs(N, 4)
    fast = predictive(posterior, x, 2000, "moments", seed=0)
    slow = predictive(posterior, x, 1000, "weights", seed=0)
    assert (fast.probabilities - slow.probabilities).abs().max() < 0.03


# Classes.


def by_hand(posterior: Posterior, x: Tensor, draws: int) -> np.ndarray:
    """Class probabilities, (S, N, K), from the same stream of random numbers."""
    torch.manual_seed(5)
    return posterior.predict(x, draws).double().numpy()


def test_classes_are_those_of_the_draws():
    posterior, x = posterior_of(one_hidden(3), Categorical()), inputs(N, 4)
    p = by_hand(posterior, x, 6)
    result = predictive(posterior, x, 6, "weights", batch_size=3, seed=5, keep_draws=True)
    assert isinstance(result, ClassificationPredictive)
    np.testing.assert_allclose(result.probabilities, p.mean(0), rtol=1e-6)
    np.testing.assert_allclose(result.entropy, stats.entropy(p.mean(0), axis=-1), rtol=1e-6)
    expected = stats.entropy(p, axis=-1).mean(0)
    np.testing.assert_allclose(result.expected_entropy, expected, rtol=1e-6)
    np.testing.assert_allclose(result.draws, p, rtol=1e-5)
    assert result.num_samples == 6
    assert result.probabilities.dtype == torch.float64


def test_two_classes_by_bernoulli_and_by_categorical_are_the_same():
    net = one_hidden(1)
    both = deepcopy(net)
    both[2] = nn.Linear(8, 2)
    with torch.no_grad():
        for source, target in ((net[2].weight, both[2].weight), (net[2].bias, both[2].bias)):
            target.copy_(torch.cat([torch.zeros_like(source), source]))
    x = inputs(N, 4)
    one = predictive(posterior_of(net, Bernoulli(), -30.0), x, 2)
    two = predictive(posterior_of(both, Categorical(), -30.0), x, 2)
    assert one.probabilities.shape == (N, 1, 2)
    torch.testing.assert_close(one.probabilities[:, 0], two.probabilities, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.entropy[:, 0], two.entropy, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        one.log_density(torch.ones(N, 1))[:, 0], two.log_density(torch.ones(N)), atol=1e-4, rtol=0
    )


def test_sure_draws_that_disagree_are_all_epistemic():
    """Entropies of 0 and of log 2, and no NaN out of 0 log 0."""
    posterior = posterior_of(nn.Linear(1, 1, bias=False), Bernoulli(), 30.0)
    result = predictive(posterior, torch.full((1, 1), 1e3), 400, seed=0)
    assert float(result.expected_entropy) < 0.01
    assert float(result.mutual_information) == pytest.approx(math.log(2), abs=0.02)


def test_networks_with_positions_keep_them():
    posterior = posterior_of(one_hidden(3), Categorical())
    for method in ("local", "weights"):
        result = predictive(posterior, inputs(N, 5, 4), 3, method)
        assert result.probabilities.shape == (N, 5, 3)
        assert result.mutual_information.shape == result.predict().shape == (N, 5)


# Regression.


def test_a_regression_is_the_mixture_of_the_draws():
    posterior, x = posterior_of(one_hidden(2), Gaussian(0.3)), inputs(N, 4)
    torch.manual_seed(5)
    means = posterior.predict(x, 6).double()
    result = predictive(posterior, x, 6, "weights", batch_size=3, seed=5)
    assert isinstance(result, RegressionPredictive)
    torch.testing.assert_close(result.component_means, means, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.mean, result.component_means.mean(0))
    variance = result.component_means.numpy().var(0)
    np.testing.assert_allclose(result.epistemic_variance, variance, rtol=1e-9)
    np.testing.assert_allclose(result.variance, variance + 0.09, rtol=1e-6)


def test_noise_that_was_learned_counts():
    likelihood = Gaussian(0.3, noise="learned")
    posterior = posterior_of(one_hidden(1), likelihood)
    with torch.no_grad():
        posterior.model.likelihood.log_scale.fill_(math.log(2.0))
    for method in METHODS:
        result = predictive(posterior, inputs(N, 4), 3, method)
        torch.testing.assert_close(result.aleatoric_variance.float(), torch.full((N, 1), 4.0))
        assert not result.mean.requires_grad


def test_noise_may_differ_from_point_to_point():
    """Log-normal variances of a linear network, in closed form; draws to 5 standard errors of N."""
    torch.manual_seed(1)
    net, draws = nn.Linear(4, 2), 1000
    posterior, x = posterior_of(net, Gaussian(noise="heteroscedastic"), -2.0), inputs(N, 4)
    _, log_variance = net(x).detach().double().chunk(2, -1)
    variance = x.square().sum(1, keepdim=True).double() * math.exp(-2)
    expected = (log_variance + 0.5 * variance).exp()
    fast = predictive(posterior, x, method="moments")
    torch.testing.assert_close(fast.aleatoric_variance, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(fast.epistemic_variance, variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(fast.quantile(0.5), fast.mean)
    for method in ("local", "weights"):
        drawn = predictive(posterior, x, draws, method, seed=3)
        assert drawn.mean.shape == drawn.aleatoric_variance.shape == (N, 1)
        assert drawn.component_scales.shape == (draws, N, 1)
        variances = drawn.component_scales.square()
        torch.testing.assert_close(drawn.aleatoric_variance, variances.mean(0))
        error = variances.std(0) / math.sqrt(draws)
        assert ((drawn.aleatoric_variance - expected).abs() < 5 * error).all()


# Draws.


def test_weights_are_shared_by_all_rows_and_local_draws_are_not():
    posterior = posterior_of(nn.Linear(4, 1), Gaussian())
    x = inputs(1, 4).expand(50, 4)
    shared = predictive(posterior, x, 4, "weights", batch_size=20).component_means
    local = predictive(posterior, x, 4, "local", batch_size=20).component_means
    assert shared.std(1).max() < 1e-6
    assert local.std(1).min() > 0.1


@pytest.mark.parametrize("x", [torch.randn(N, 3), torch.randn(4)], ids=["features", "one point"])
@pytest.mark.parametrize("method", METHODS)
def test_an_error_leaves_everything_as_it_was(method, x):
    """Also while the traceback is kept, as notebooks do."""
    posterior = posterior_of(one_hidden(3), Categorical())
    posterior.model.train()
    pyro.param("mine", torch.zeros(1))
    with pytest.raises(ValueError, match="x"):
        predictive(posterior, x, 5, method)
    assert posterior.model.net[0].training
    assert list(pyro.get_param_store()) == ["mine"]


def test_draws_that_have_no_room_are_refused_by_name():
    posterior = posterior_of(one_hidden(1), Gaussian())
    with pytest.raises(MemoryError, match=r"num_samples=10{13} draws for 7 data points take"):
        predictive(posterior, inputs(N, 4), 10**13)


def test_moments_know_what_logits_share():
    """All logits go up and down with the one hidden unit, which no class notices."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 3))
    posterior = posterior_of(net, Categorical(), -2.0)
    with torch.no_grad():
        posterior.guide.loc.get_parameter("2.weight").fill_(3.0)
        posterior.guide.log_sigma2.get_parameter("2.weight").fill_(-20.0)
    x = inputs(N, 4)
    found = {m: predictive(posterior, x, 2000, m, seed=0) for m in ("weights", "moments")}
    assert found["weights"].mutual_information.max() < 1e-3
    assert found["moments"].mutual_information.max() < 1e-3
    torch.testing.assert_close(
        found["moments"].entropy, found["weights"].entropy, rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_repeats_and_leaves_the_generator_alone(method):
    posterior, x = posterior_of(one_hidden(3), Categorical()), inputs(N, 4)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    results = [predictive(posterior, x, 5, method, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(results[0].log_probabilities, results[1].log_probabilities)
    assert not torch.equal(results[0].log_probabilities, results[2].log_probabilities)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_posterior_changes(method):
    posterior = posterior_of(one_hidden(3), Categorical())
    posterior.model.net[1].train()
    before = {k: v.clone() for k, v in posterior.guide.state_dict().items()}
    predictive(posterior, inputs(N, 4), 2, method, threshold=-5.0)
    assert all(torch.equal(v, before[k]) for k, v in posterior.guide.state_dict().items())
    assert posterior.model.net[1].training


@pytest.mark.parametrize("method", ["local", "weights"])
def test_a_weight_that_is_used_twice_has_one_draw(method):
    result = predictive(posterior_of(Twice(), Gaussian()), inputs(N, 4), 3, method)
    assert result.component_means.abs().max() == 0


def test_recurrent_networks_and_several_inputs():
    result = predictive(posterior_of(LastOutput(), Categorical()), inputs(N, 5, 2), 3)
    assert result.probabilities.shape == (N, 3)
    pair = (inputs(N, 2), inputs(N, 3))
    posterior = posterior_of(nn.Bilinear(2, 3, 2), Gaussian())
    for method in ("local", "weights"):
        assert predictive(posterior, pair, 3, method).mean.shape == (N, 2)
    with pytest.raises(TypeError, match='"moments" takes networks of one input, but x has 2'):
        predictive(posterior, pair, method="moments")


@pytest.mark.parametrize("method", METHODS)
def test_a_threshold_prunes_every_draw(method):
    posterior, x = posterior_of(one_hidden(2), Gaussian()), inputs(N, 4)
    all_pruned = predictive(posterior, x, 3, method, threshold=-100.0)
    bias = posterior.model.net[2].bias.detach().double()
    # With no weight left, the first layer's biases reach nothing.
    torch.testing.assert_close(all_pruned.mean, bias.expand(N, 2), rtol=1e-5, atol=1e-6)
    assert all_pruned.epistemic_variance.max() < 1e-10
    none = [predictive(posterior, x, 3, method, seed=1, threshold=t) for t in (None, math.inf)]
    assert torch.equal(none[0].mean, none[1].mean)


def test_arrays_and_lists_are_inputs_too():
    posterior, x = posterior_of(one_hidden(2), Gaussian()), inputs(N, 4)
    x_array = x.numpy().copy()
    x_array.flags.writeable = False
    expected = predictive(posterior, x, 2, seed=0).mean
    assert torch.equal(predictive(posterior, x_array, 2, seed=0).mean, expected)


def test_the_posterior_has_it_as_a_method():
    posterior, x = posterior_of(one_hidden(3), Categorical()), inputs(N, 4)
    direct = predictive(posterior, x, 4, "weights", 3, 1, threshold=2.0, keep_draws=True)
    asked = posterior.predictive(
        x, 4, method="weights", batch_size=3, seed=1, threshold=2.0, keep_draws=True
    )
    assert torch.equal(asked.draws, direct.draws)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = (leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_draws(method, monkeypatch):
    monkeypatch.setattr("bayes_svdo.inference.draws._MOST_DRAWS", 1)
    size, classes = 300, 40
    posterior = posterior_of(one_hidden(classes), Categorical())
    x = inputs(size, 4)
    largest = []
    for draws in (2, 20):
        with Largest() as mode:
            predictive(posterior, x, draws, method, batch_size=50)
        largest.append(mode.numel)
    assert largest == [size * classes] * 2


def test_a_regression_keeps_the_outputs_of_all_draws_once():
    posterior, draws = posterior_of(one_hidden(2), Gaussian()), 20
    with Largest() as mode:
        predictive(posterior, inputs(300, 4), draws, batch_size=50)
    assert mode.numel == draws * 300 * 2


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_results_are_on_the_posteriors_device(method):
    x = inputs(N, 4)
    classes = predictive(posterior_of(one_hidden(3), Categorical()).to("cuda"), x, 5, method)
    assert classes.log_density(torch.zeros(N)).device.type == "cuda"
    assert classes.draw(2, seed=0).device.type == "cuda"
    regression = predictive(posterior_of(one_hidden(2), Gaussian()).to("cuda"), x, 5, method)
    assert regression.log_density(torch.zeros(N, 2)).device.type == "cuda"
    assert regression.draw(2, seed=0).device.type == "cuda"
    assert regression.quantile(0.5).device.type == "cuda"


# What it refuses.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_samples": 0}, "num_samples must be an integer of at least 1, but is 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"method": "weight"}, 'unknown method "weight". Did you mean "weights"'),
        ({"seed": 0.5}, "seed must be an integer or None"),
        ({"threshold": math.nan}, "threshold must be a number"),
        ({"x": torch.full((3, 4), math.nan)}, "x holds NaN or inf, in 3 of 3 data points"),
        ({"x": torch.zeros(0, 4)}, "x is empty"),
        ({"x": torch.zeros(3, 5)}, r"cannot take x of shape \(3, 5\)"),
        ({"x": torch.tensor(1.0)}, "is a scalar"),
        ({"x": (torch.zeros(3, 4), torch.zeros(2, 4))}, r"x\[1\] has 2 data points, but x\[0\] 3"),
        ({"x": ()}, "x is empty"),
    ],
)
def test_bad_arguments_are_named(settings, words):
    posterior = posterior_of(one_hidden(3), Categorical())
    with pytest.raises(ValueError, match=words):
        predictive(posterior, **{"x": inputs(N, 4), **settings})


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian()])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_are_not_finite_are_reported(likelihood, method):
    posterior = posterior_of(one_hidden(3), likelihood)
    x = inputs(N, 4)
    with torch.no_grad():
        posterior.model.net[2].bias[1] = math.nan
    with pytest.raises(ValueError, match=f"NaN or infinite for {N} of {N} inputs, the first at"):
        predictive(posterior, x, 2, method)


def test_other_likelihoods_and_models_are_refused(hand_written):
    with pytest.raises(TypeError, match="likelihood, but the model's is a Poisson"):
        predictive(posterior_of(one_hidden(1), Poisson()), inputs(N, 4))
    with pytest.raises(TypeError, match="predictive needs a BayesianNetwork"):
        predictive(hand_written, inputs(N, 4))
    with pytest.raises(TypeError, match="predictive needs a Posterior"):
        predictive(one_hidden(1), inputs(N, 4))


def test_moments_of_another_network_are_refused():
    posterior = posterior_of(LastOutput(), Categorical())
    with pytest.raises(TypeError, match="the net is a LastOutput"):
        predictive(posterior, inputs(N, 5, 2), method="moments")
