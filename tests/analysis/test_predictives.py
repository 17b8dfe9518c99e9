"""What predictive distributions answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from torch import Tensor

from bayes_svdo.analysis.predictives import (
    _CHUNK,
    ClassificationPredictive,
    RegressionPredictive,
)


def classes(draws: np.ndarray) -> ClassificationPredictive:
    """From class probabilities of all draws, (S, N, K)."""
    p = torch.as_tensor(draws, dtype=torch.float64)
    entropy = torch.as_tensor(stats.entropy(p.numpy(), axis=-1)).mean(0)
    return ClassificationPredictive(p.mean(0).log(), entropy, "local", len(p))


def mixture(means: Tensor, scales: Tensor) -> RegressionPredictive:
    means, scales = means.double(), scales.double()
    return RegressionPredictive(
        means.mean(0),
        scales.square().mean(0).expand(means.shape[1:]),
        means.var(0, correction=0),
        means,
        scales,
        "local",
        len(means),
    )


def some_mixture(size: int = 5) -> RegressionPredictive:
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(8, size, generator=generator)
    return mixture(means, 0.2 + torch.rand(8, size, generator=generator))


SURE = classes(np.array([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]]))


def test_entropies_are_scipys():
    p = np.random.default_rng(0).dirichlet([0.3] * 5, size=(6, 9))
    result = classes(p)
    np.testing.assert_allclose(result.entropy, stats.entropy(p.mean(0), axis=-1))
    total = result.expected_entropy + result.mutual_information
    torch.testing.assert_close(result.entropy, total)
    kl = stats.entropy(p, p.mean(0)[None].repeat(6, 0), axis=-1).mean(0)
    np.testing.assert_allclose(result.mutual_information, kl)


def test_disagreement_is_epistemic_and_indecision_aleatoric():
    torch.testing.assert_close(SURE.entropy, torch.full((2,), math.log(2), dtype=torch.float64))
    expected = torch.tensor([math.log(2), 0.0], dtype=torch.float64)
    torch.testing.assert_close(SURE.mutual_information, expected)


def test_mutual_information_is_not_negative():
    """One draw leaves a difference of rounding errors, either way."""
    p = np.random.default_rng(0).dirichlet([1.0] * 10, size=(1, 1000))
    result = classes(p)
    assert (result.entropy - result.expected_entropy).min() < 0
    assert result.mutual_information.min() == 0
    assert result.mutual_information.max() < 1e-14


def test_the_probability_of_labels_is_read_off():
    y = torch.tensor([1, 0])
    expected = torch.full((2,), math.log(0.5), dtype=torch.float64)
    for labels in (y, y.double(), y.numpy(), [1, 0], y.bool()):
        torch.testing.assert_close(SURE.log_density(labels), expected)
    assert SURE.log_density([2, 2]).tolist() == [-math.inf] * 2


def test_tiny_probabilities_are_kept():
    log_p = torch.tensor([[0.0, -5000.0]], dtype=torch.float64)
    result = ClassificationPredictive(log_p, torch.zeros(1, dtype=torch.float64), "local", 1)
    assert float(result.log_density([1])) == -5000
    assert float(result.entropy) == 0
    assert result.predict().tolist() == [0]


@pytest.mark.parametrize(
    ("y", "error", "words"),
    [
        ([0, 3], ValueError, r"labels outside 0..2: 3"),
        ([-1, 0], ValueError, r"labels outside 0..2: -1"),
        ([0], ValueError, r"y must have shape \(2,\), but has shape \(1,\)"),
        ([[0], [1]], ValueError, r"has shape \(2, 1\)"),
        ([0.5, 1.0], TypeError, "whole numbers"),
        ([math.nan, 1.0], ValueError, "y holds NaN or inf"),
    ],
)
def test_bad_labels_are_named(y, error, words):
    with pytest.raises(error, match=words):
        SURE.log_density(y)


def test_labels_are_drawn_by_their_probabilities():
    """5 standard errors of 6 frequencies: fails by chance once in 3e5 runs."""
    p = np.array([[[0.2, 0.3, 0.5], [0.0, 0.1, 0.9]]])
    drawn = classes(p).draw(10_000, seed=0)
    assert drawn.shape == (10_000, 2)
    for row in range(2):
        frequency = np.bincount(drawn[:, row].numpy(), minlength=3) / 10_000
        assert (
            np.abs(frequency - p[0, row]) <= 5 * np.sqrt(p[0, row] * (1 - p[0, row])) / 100
        ).all()


# Regression.


def test_densities_and_probabilities_are_those_of_the_mixture():
    result = some_mixture()
    y = torch.linspace(-3, 3, 5)
    normal = stats.norm(result.component_means.numpy(), result.component_scales.numpy())
    density = normal.pdf(y.numpy()).mean(0)
    np.testing.assert_allclose(result.log_density(y), np.log(density))
    np.testing.assert_allclose(result.cdf(y.numpy()), normal.cdf(y.numpy()).mean(0))
    np.testing.assert_allclose(result.std, result.variance.sqrt())
    assert torch.equal(result.predict(), result.mean)


def test_the_variance_is_that_of_draws():
    """5 standard errors, with a kurtosis below 3: fails by chance once in 1e6 runs."""
    result = some_mixture()
    drawn = result.draw(40_000, seed=1)
    error = result.variance * math.sqrt(2 / 40_000)
    assert ((drawn.var(0) - result.variance).abs() < 5 * error).all()
    assert ((drawn.mean(0) - result.mean).abs() < 5 * result.std / 200).all()


def test_draws_share_a_component():
    means = torch.tensor([[0.0, 0.0], [100.0, 100.0]])
    drawn = mixture(means, torch.ones(1, 1)).draw(500, seed=0)
    assert ((drawn > 50).all(1) | (drawn < 50).all(1)).all()
    assert 150 < (drawn[:, 0] > 50).sum() < 350


def test_densities_far_out_do_not_underflow():
    result = mixture(torch.tensor([[0.0], [1.0]]), torch.ones(1, 1))
    expected = stats.norm(1.0).logpdf(1000.0) - math.log(2)
    assert float(result.log_density([1000.0])) == pytest.approx(expected)


@pytest.mark.parametrize("q", [1e-6, 0.025, 0.5, 0.9, 1 - 1e-6])
def test_quantiles_are_scipys_roots(q):
    result = some_mixture(4)
    quantiles = result.quantile(q)
    for row in range(4):
        normal = stats.norm(
            result.component_means[:, row].numpy(), result.component_scales[:, row].numpy()
        )
        root = optimize.brentq(lambda y, n=normal: n.cdf(y).mean() - q, -40, 40, xtol=1e-13)
        assert float(quantiles[row]) == pytest.approx(root, abs=1e-8)


def test_one_component_has_normal_quantiles():
    result = mixture(torch.tensor([[2.0, -1.0]]), torch.tensor([[3.0, 0.5]]))
    expected = stats.norm([2.0, -1.0], [3.0, 0.5]).ppf([[0.1], [0.99]])
    np.testing.assert_allclose(result.quantile([0.1, 0.99]), expected, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e2)), min_size=1, max_size=6),
    st.floats(0.001, 0.999),
)
def test_quantiles_invert_the_cdf(parts, q):
    means, scales = torch.tensor(parts, dtype=torch.float64).T[..., None]
    result = mixture(means, scales)
    y = result.quantile(q)
    slack = 1e-9 * float(scales.min()) + 1e-11 * float(y.abs())
    assert float(result.cdf(y - slack)) <= q + 1e-12
    assert float(result.cdf(y + slack)) >= q - 1e-12


def test_probabilities_may_be_numbers_of_numpy_and_torch():
    predictive = some_mixture()
    median = predictive.quantile(0.5)
    for q in (np.float32(0.5), torch.tensor(0.5)):
        assert torch.equal(predictive.quantile(q), median)
    both = predictive.quantile(np.array([0.25, 0.5]))
    assert both.shape == (2, *median.shape)
    assert torch.equal(both[1], median)


def test_joint_densities_are_those_of_all_targets_of_a_data_point():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(6, 3, 2, generator=generator).double()
    scales = 0.5 + torch.rand(6, 3, 2, generator=generator).double()
    y = torch.randn(3, 2, generator=generator).double()
    for s in (scales, scales[:1, :1]):
        components = stats.norm(means.numpy(), s.numpy()).pdf(y.numpy()).prod(-1)
        joint = mixture(means, s).log_density(y, joint=True)
        np.testing.assert_allclose(joint, np.log(components.mean(0)), rtol=1e-12)
    one = some_mixture()
    assert torch.allclose(one.log_density(one.mean, joint=True), one.log_density(one.mean))


def test_intervals_hold_their_probability():
    result = some_mixture()
    lower, upper = result.interval(0.8)
    probability = result.cdf(upper) - result.cdf(lower)
    torch.testing.assert_close(probability, torch.full_like(probability, 0.8))
    torch.testing.assert_close(result.cdf(lower), torch.full_like(lower, 0.1))


@pytest.mark.parametrize("shared", [True, False])
def test_rows_in_chunks_are_the_same(shared, monkeypatch):
    result = some_mixture(7)
    if shared:
        result = mixture(result.component_means, torch.full((1, 1), 0.7))
    y = torch.zeros(7)
    expected = result.log_density(y)
    monkeypatch.setattr("bayes_svdo.analysis.predictives._CHUNK", 17)
    assert _CHUNK > 17
    assert torch.equal(result.log_density(y), expected)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda r: r.log_density(torch.zeros(4)), r"y must have shape \(5,\), but has shape \(4,"),
        (lambda r: r.cdf(torch.zeros(5, 1)), r"has shape \(5, 1\)"),
        (lambda r: r.cdf([0.0, math.nan, 0, 0, 0]), "y holds NaN or inf, in 1 of 5 data points"),
        (lambda r: r.quantile(1.0), "q must lie between 0 and 1, but is 1.0"),
        (lambda r: r.quantile([0.1, 0.0]), "q must lie between 0 and 1, but is 0.0"),
        (lambda r: r.quantile([]), "q is empty"),
        (lambda r: r.interval(0), "level must lie between 0 and 1, but is 0"),
        (lambda r: r.draw(0), "num_samples must be an integer of at least 1"),
    ],
)
def test_bad_questions_are_named(ask, words):
    with pytest.raises(ValueError, match=words):
        ask(some_mixture())


def test_they_print_as_a_line():
    assert repr(SURE) == (
        'ClassificationPredictive(probabilities of shape (2, 3), 2 draws by "local"; means in '
        "nats: entropy 0.693, mutual information 0.347)"
    )
    assert repr(mixture(torch.ones(3, 4), torch.full((1, 4), 0.5))) == (
        'RegressionPredictive(mean of shape (4,), 3 draws by "local"; mean variance: '
        "aleatoric 0.25, epistemic 0)"
    )
