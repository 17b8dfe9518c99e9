from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from sklearn.metrics import accuracy_score, root_mean_squared_error
from torch import Tensor

from bayes_svdo.models import Bernoulli, Categorical, Gaussian, Likelihood

N, T, K = 6, 4, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(2)


def scored(
    likelihood: Likelihood, output: Tensor, y: Tensor, num_data: int, sample_dims: int = 0
) -> Tensor:
    """The log probability that a trace adds to the objective."""
    trace = poutine.trace(likelihood).get_trace(output, y, num_data, sample_dims)
    trace.compute_log_prob()
    total: Tensor = trace.nodes["y"]["log_prob_sum"]
    return total


D = torch.distributions
GENERATOR = torch.Generator().manual_seed(11)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=GENERATOR)


def categorical(output: Tensor, y: Tensor) -> Tensor:
    return D.Categorical(logits=output).log_prob(y)


def bernoulli(output: Tensor, y: Tensor) -> Tensor:
    return D.Bernoulli(logits=output).log_prob(y)


def gaussian(output: Tensor, y: Tensor) -> Tensor:
    return D.Normal(output, 0.3).log_prob(y)


def heteroscedastic(output: Tensor, y: Tensor) -> Tensor:
    return D.Normal(output[..., :K], output[..., K:].exp().sqrt()).log_prob(y)


# name: (likelihood, output, targets, log probability of each target by torch.distributions)
CASES: dict[str, Any] = {
    "classes": (Categorical, normal(N, K), integers(K, N), categorical),
    "classes of a sequence": (Categorical, normal(N, T, K), integers(K, N, T), categorical),
    "learned noise": (
        lambda: Gaussian(0.3, noise="learned"),
        normal(N, K),
        normal(N, K),
        gaussian,
    ),
    "heteroscedastic noise": (
        lambda: Gaussian(noise="heteroscedastic"),
        normal(N, T, 2 * K),
        normal(N, T, K),
        heteroscedastic,
    ),
}
for _shape in ((N,), (N, 1), (N, K), (N, T, K)):
    CASES[f"binary, {_shape}"] = (
        Bernoulli,
        normal(*_shape),
        integers(2, *_shape).float(),
        bernoulli,
    )
    CASES[f"known noise, {_shape}"] = (
        lambda: Gaussian(0.3),
        normal(*_shape),
        normal(*_shape),
        gaussian,
    )
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@each_case
def test_log_probabilities_are_those_of_torch_distributions(case: Any) -> None:
    make, output, y, log_prob = case
    expected = log_prob(output, y).sum()
    torch.testing.assert_close(scored(make(), output, y, num_data=N), expected)


@each_case
def test_a_batch_stands_for_num_data_points(case: Any) -> None:
    make, output, y, log_prob = case
    torch.testing.assert_close(
        scored(make(), output[:2], y[:2], num_data=50), 25 * log_prob(output[:2], y[:2]).sum()
    )


@each_case
def test_each_of_several_samples_is_scored(case: Any) -> None:
    make, output, y, log_prob = case
    samples = torch.stack([output, output.flip(0), 2 * output])
    for shape in ((3,), (3, 1)):
        many = samples.reshape(*shape, *output.shape)
        trace = poutine.trace(make()).get_trace(many, y, N, len(shape))
        trace.compute_log_prob()
        assert trace.nodes["y"]["log_prob"].shape == (*shape, N)
        expected = sum(log_prob(sample, y).sum() for sample in samples)
        torch.testing.assert_close(trace.nodes["y"]["log_prob_sum"], expected)


@each_case
def test_predictions_have_the_shape_of_the_targets_and_the_mean_of_the_distribution(
    case: Any,
) -> None:
    make, output, y, _ = case
    likelihood = make()
    trace = poutine.trace(likelihood).get_trace(output, None, 1)  # num_data is the training set's
    assert trace.nodes["y"]["value"].shape == y.shape
    assert not trace.nodes["y"]["is_observed"]
    assert trace.nodes["y"]["scale"] == 1.0
    mean = likelihood.mean(output)
    if isinstance(likelihood, Categorical):
        torch.testing.assert_close(mean, F.softmax(output, -1))
    else:
        torch.testing.assert_close(mean, likelihood.distribution(output).mean)
        assert mean.shape == y.shape


@each_case
def test_samples_follow_the_mean(case: Any) -> None:
    """6 standard errors per element of 2,000 draws: fails by chance once in 1e7 runs in all."""
    make, output, _, _ = case
    distribution = make().distribution(output)
    draws = distribution.sample((2000,))
    if isinstance(distribution, dist.Categorical):
        draws = F.one_hot(draws, K).float()
    error = 6 * draws.std(0) / 2000**0.5 + 1e-6
    assert ((draws.mean(0) - make().mean(output)).abs() < error).all()


@each_case
def test_good_targets_pass_the_check(case: Any) -> None:
    make, output, y, _ = case
    make().check(torch.cat([y, y]), output[:2], "train y")


@each_case
def test_targets_that_would_broadcast_are_refused(case: Any) -> None:
    make, output, y, _ = case
    for wrong in (y[..., None], y[:1], y[:, None]):
        if wrong.shape == y.shape:
            continue
        with pytest.raises(ValueError, match=r"y must have shape \(6.*but has shape \("):
            scored(make(), output, wrong, num_data=N)


def test_more_points_than_num_data_are_refused() -> None:
    with pytest.raises(ValueError, match="the batch holds 6 data points, but num_data=5"):
        scored(Categorical(), torch.randn(N, K), torch.zeros(N).long(), num_data=5)


def test_accuracy_is_that_of_scikit_learn() -> None:
    output, y = torch.randn(200, K), torch.randint(K, (200,))
    likelihood: Likelihood = Categorical()
    assert likelihood.metric == "accuracy"
    assert likelihood.higher_is_better
    scores = likelihood.score(output, y)
    assert scores.shape == (200,)
    assert likelihood.reduce(scores) == pytest.approx(accuracy_score(y, output.argmax(-1)))
    likelihood = Bernoulli()
    output, y = normal(200), integers(2, 200).float()
    expected = accuracy_score(y.numpy(), (output > 0).numpy())
    assert likelihood.reduce(likelihood.score(output, y)) == pytest.approx(expected)


def test_scores_of_sequences_are_means_over_positions() -> None:
    output, y = torch.randn(N, T, K), torch.randint(K, (N, T))
    expected = (output.argmax(-1) == y).float().mean(1)
    torch.testing.assert_close(Categorical().score(output, y), expected)
    y = integers(2, N, T, K).float()
    expected = ((output > 0) == (y > 0)).float().mean((1, 2))
    torch.testing.assert_close(Bernoulli().score(output, y), expected)


@pytest.mark.parametrize("noise", ["known", "learned", "heteroscedastic"])
def test_rmse_is_that_of_scikit_learn(noise: Any) -> None:
    output, y = torch.randn(100, K), torch.randn(100, K)
    likelihood = Gaussian(noise=noise)
    assert likelihood.metric == "RMSE"
    assert not likelihood.higher_is_better
    if noise == "heteroscedastic":
        scores = likelihood.score(torch.cat([output, torch.randn(100, K)], -1), y)
    else:
        scores = likelihood.score(output, y)
    assert scores.shape == (100,)
    expected = root_mean_squared_error(y.flatten().numpy(), output.flatten().numpy())
    assert likelihood.reduce(scores) == pytest.approx(float(expected), rel=1e-6)


def test_learned_noise_is_a_parameter_whose_best_value_is_the_rmse() -> None:
    y = 3 * torch.randn(500)
    rmse = float(y.square().mean().sqrt())
    gradients = []
    for scale in (0.5 * rmse, rmse, 2 * rmse):
        likelihood = Gaussian(scale, noise="learned")
        assert [name for name, _ in likelihood.named_parameters()] == ["log_scale"]
        (-scored(likelihood, torch.zeros(500), y, num_data=500) / 500).backward()
        gradients.append(float(likelihood.log_scale.grad))  # type: ignore[arg-type]
    # d/dlog(scale) of log(scale) + rmse² / (2 scale²)
    assert gradients == pytest.approx([-3.0, 0.0, 0.75], abs=1e-4)


def test_known_noise_is_no_parameter_and_is_saved() -> None:
    likelihood = Gaussian(0.25)
    assert list(likelihood.parameters()) == []
    other = Gaussian()
    other.load_state_dict(likelihood.state_dict())
    assert float(other.distribution(torch.zeros(1)).scale) == pytest.approx(0.25)


def test_double_precision_stays_double() -> None:
    for noise in ("known", "learned", "heteroscedastic"):
        distribution = Gaussian(noise=noise).distribution(torch.zeros(N, 2).double())
        assert distribution.mean.dtype == torch.float64


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be a positive number, but is"):
        Gaussian(scale)


def test_an_unknown_noise_is_refused() -> None:
    words = 'noise must be "known", "learned" or "heteroscedastic", but is \'unknown\''
    with pytest.raises(ValueError, match=words):
        Gaussian(noise="unknown")  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(N, 3), (N,)])
def test_heteroscedastic_noise_needs_an_even_number_of_outputs(shape: tuple[int, ...]) -> None:
    likelihood = Gaussian(noise="heteroscedastic")
    for use in (likelihood.distribution, lambda o: likelihood.check(torch.randn(N, 1), o, "y")):
        with pytest.raises(ValueError, match=r"even last dimension.*means, then log variances"):
            use(torch.randn(shape))


X3, X33 = torch.zeros(2, 3), torch.zeros(2, 3, 3)
TWO_HALVES = Gaussian(noise="heteroscedastic")
# name: (likelihood, targets, output of the network, words of the TypeError or ValueError)
BAD_TARGETS: dict[str, Any] = {
    "float labels": (
        Categorical(),
        torch.zeros(N),
        X3,
        r"TypeError: train y holds class labels and must be int64.*float32\.\n.*Try y\.long\(\)",
    ),
    "int32 labels": (Categorical(), torch.zeros(N).int(), X3, "TypeError.*is torch.int32"),
    "boolean labels": (Categorical(), torch.zeros(N).bool(), X3, "TypeError.*torch.bool"),
    "labels too large": (
        Categorical(),
        torch.tensor([0, 3, 2, 9]),
        X3,
        r"ValueError: train y holds labels outside 0\.\.2, .* 3 outputs: 3, 9\.",
    ),
    "negative label": (Categorical(), torch.tensor([0, -1]), X3, r"ValueError.*0\.\.2.*: -1\."),
    "many wrong labels": (Categorical(), torch.arange(20), X3, r": 3, 4, 5, 6, 7, \.\.\.\."),
    "one-hot labels": (
        Categorical(),
        torch.zeros(N, 3).long(),
        X3,
        r"ValueError: train y must have shape \(N,\).*\(2, 3\), but has shape \(6, 3\)",
    ),
    "classes in the second dimension": (
        Categorical(),
        torch.zeros(N, 5, 5).long(),
        torch.zeros(2, 3, 5, 5),
        r"(?s)ValueError: train y of shape \(6, 5, 5\).*\(2, 3, 5, 5\).*movedim\(1, -1\)",
    ),
    "short sequences": (
        Categorical(),
        torch.zeros(N, 2).long(),
        X33,
        r"ValueError.*\(N, 3\).*\(2, 3, 3\).*\(6, 2\)",
    ),
    "integer targets": (
        Bernoulli(),
        torch.zeros(N, 3).long(),
        X3,
        r"TypeError: train y must have the dtype of the network's output, torch\.float32, but has "
        r"torch\.int64\.\n.*Try y\.to\(torch\.float32\)",
    ),
    "not zero or one": (
        Bernoulli(),
        torch.tensor([[0.0, 0.5, 2.0]]),
        X3,
        r"ValueError: train y must hold 0 and 1 only, but holds 0\.5, 2\.0\.",
    ),
    "flat targets of one output": (
        Bernoulli(),
        torch.zeros(N),
        X3[:, :1],
        r"ValueError.*\(N, 1\).*but has shape \(6,\)\.\n  Try y\[:, None\]\.",
    ),
    "column of targets of a flat output": (
        Gaussian(),
        torch.zeros(N, 1),
        torch.zeros(2),
        r"ValueError: train y must have shape \(N,\).*\(6, 1\)",
    ),
    "double targets": (
        Gaussian(),
        torch.zeros(N, 3).double(),
        X3,
        r"TypeError.*torch\.float32, but has torch\.float64",
    ),
    "too many targets": (Gaussian(), torch.zeros(N, 4), X3, r"ValueError.*\(N, 3\).*\(6, 4\)"),
    "as many targets as means and variances": (
        TWO_HALVES,
        torch.zeros(N, 4),
        torch.zeros(2, 4),
        r"ValueError.*\(N, 2\).*but has shape \(6, 4\)",
    ),
}


@pytest.mark.parametrize("case", BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_bad_targets_are_refused_by_name(case: Any) -> None:
    likelihood, y, output, words = case
    with pytest.raises((TypeError, ValueError)) as caught:
        likelihood.check(y, output, "train y")
    assert re.search(words, f"{caught.type.__name__}: {caught.value}")


class Poisson(Likelihood):
    """Counts, as a user would write it."""

    metric = "absolute error"
    higher_is_better = False

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        poisson: dist.TorchDistribution = dist.Poisson(output.exp())
        return poisson

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        return (output.exp() - y).abs()

    def check(self, y: Tensor, output: Tensor, name: str) -> None:
        if (y < 0).any():
            raise ValueError(f"{name} must not be negative.")


def test_a_likelihood_of_ones_own_needs_three_methods() -> None:
    output, y = torch.randn(N), torch.arange(N).float()
    expected = D.Poisson(output.exp()).log_prob(y).sum() * 10
    torch.testing.assert_close(scored(Poisson(), output, y, num_data=10 * N), expected)
    scores = Poisson().score(output, y)
    assert Poisson().reduce(scores) == pytest.approx(float(np.mean(scores.numpy())))
    torch.testing.assert_close(Poisson().mean(output), output.exp())
    with pytest.raises(TypeError, match="abstract"):
        Likelihood()  # type: ignore[abstract]


@pytest.mark.cuda
@each_case
def test_they_score_on_cuda(case: Any) -> None:
    make, output, y, log_prob = case
    total = scored(make().cuda(), output.cuda(), y.cuda(), num_data=N)
    assert total.is_cuda
    torch.testing.assert_close(total.cpu(), log_prob(output, y).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_scored_in_single(dtype: torch.dtype) -> None:
    """In bfloat16 the second class of these would have probability zero, and the NLL no digits."""
    logits, y = torch.tensor([[9.0, 0.0, 0.0]] * 4, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scored(Categorical(), logits, y, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, -F.cross_entropy(logits.float(), y, reduction="sum"))


@pytest.mark.parametrize("scale", ["a", "1", None, [1.0]])
def test_a_scale_that_is_no_number_is_named(scale: Any) -> None:
    with pytest.raises(TypeError, match="scale must be a positive number, but is "):
        Gaussian(scale)


def test_a_scale_may_be_a_tensor_or_a_number_of_numpy() -> None:
    for scale in (torch.tensor(2.0), np.float64(2.0), 2):
        assert float(Gaussian(scale).log_scale.exp()) == pytest.approx(2.0)  # type: ignore[arg-type]
