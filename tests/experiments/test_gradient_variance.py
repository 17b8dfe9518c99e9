"""Measured variances against closed forms, and the claim about them, where it holds and not."""

import numpy as np
import pytest
import torch

from bayes_svdo.distributions import UndrawnSample
from bayes_svdo.experiments import gradient_variance as module
from bayes_svdo.experiments.gradient_variance import (
    PROGRESS,
    NoiseComparison,
    compare_noise,
    gradient_variance,
    linear_gradient_variance,
    one_weight_ratio,
    plot_noise,
)

BOTH = pytest.mark.parametrize("local", [False, True], ids=["weights", "outputs"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def regression():
    x = torch.randn(6, 3, dtype=torch.float64)
    y = torch.randn(6, dtype=torch.float64)
    loc = torch.tensor([0.5, -1.2, 0.8], dtype=torch.float64)
    log_alpha = torch.tensor([-1.0, 0.5, 1.0], dtype=torch.float64)
    return x, y, loc, log_alpha


def measure(x, y, loc, log_alpha, *, local, num_draws):
    def loss(weights):
        return 0.5 * (y - x @ weights["w"]).square().sum()

    return gradient_variance(loss, {"w": loc}, {"w": log_alpha}, local=local, num_draws=num_draws)


@BOTH
def test_measured_variances_are_those_of_the_closed_form(regression, local):
    """Standard error of a variance of 4,000 draws: 2 to 7 %, with tails heavier than normal."""
    measured = measure(*regression, local=local, num_draws=4_000)
    for found, expected in zip(
        measured, linear_gradient_variance(*regression, local=local), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0.3, atol=0.0)


@BOTH
def test_the_closed_form_is_what_quadrature_finds(local):
    """One observation of one feature: one noise variable, so that an integral settles it."""
    x, y = torch.tensor([[0.7]]).double(), torch.tensor([1.3]).double()
    loc, log_alpha = torch.tensor([-0.4]).double(), torch.tensor([0.6]).double()
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = torch.from_numpy(weights / weights.sum())
    eps = torch.from_numpy(nodes)

    def variance(gradient):
        mean = weights @ gradient
        return weights @ (gradient - mean).square()

    theta = loc.clone().requires_grad_()
    la = log_alpha.clone().requires_grad_()
    draws = theta * (1 + (0.5 * la).exp() * eps)
    losses = 0.5 * (y - 0.7 * draws).square()
    slopes = [torch.autograd.grad(each, (theta, la), retain_graph=True) for each in losses]
    by_loc, by_log_alpha = (torch.cat(column) for column in zip(*slopes, strict=True))
    additive = -0.7 * (y - 0.7 * draws.detach())
    found = linear_gradient_variance(x, y, loc, log_alpha, local=local)
    for value, gradient in zip(found, (by_loc, additive, by_log_alpha), strict=True):
        torch.testing.assert_close(value[0], variance(gradient))


@BOTH
@pytest.mark.parametrize("noise", ["multiplicative", "additive"])
def test_each_gradient_is_that_of_its_own_parameters(regression, local, noise):
    """The chain rule against autograd through ``loc (1 + sqrt(alpha) eps)``, by the same draws."""
    x, y, loc, log_alpha = regression
    gradients = []
    torch.manual_seed(3)
    for _ in range(50):
        theta = loc.clone().requires_grad_()
        size = theta if noise == "multiplicative" else loc
        weight = UndrawnSample(theta, log_alpha + 2 * size.abs().log())
        loss = 0.5 * (y - x @ (weight if local else weight.draw())).square().sum()
        gradients.append(torch.autograd.grad(loss, theta)[0])
    torch.manual_seed(3)
    found = measure(*regression, local=local, num_draws=50)
    torch.testing.assert_close(getattr(found, noise), torch.stack(gradients).var(0))


def test_log_alpha_and_log_sigma2_have_the_same_gradient(regression):
    """So additive noise gains nothing for the parameter that decides about pruning."""
    x, y, loc, log_alpha = regression
    gradients = []
    for parameter in (log_alpha, log_alpha + 2 * loc.abs().log()):
        torch.manual_seed(1)
        parameter = parameter.clone().requires_grad_()
        log_sigma2 = parameter if gradients else parameter + 2 * loc.abs().log()
        weight = UndrawnSample(loc, log_sigma2)
        loss = 0.5 * (y - x @ weight).square().sum()
        gradients.append(torch.autograd.grad(loss, parameter)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("progress", [0.5, 1.0, 2.0, None])
def test_the_ratio_of_one_weight_is_that_of_the_regression(progress):
    x = torch.tensor([[1.5]]).double()
    for log_alpha in (-3.0, 0.0, 2.0):
        share = 1 / (1 + np.exp(log_alpha)) if progress is None else progress
        loc = torch.tensor([0.8]).double()
        variances = linear_gradient_variance(
            x, x @ loc / share, loc, torch.tensor([log_alpha]).double(), local=False
        )
        ratio = float(variances.multiplicative / variances.additive)
        found = float(one_weight_ratio(np.array(log_alpha), progress))
        assert found == pytest.approx(ratio)
        if progress is None:
            assert found == pytest.approx(1 + np.exp(2 * log_alpha))


def test_multiplicative_noise_is_the_quieter_on_the_way_to_the_fit_with_little_noise():
    assert one_weight_ratio(np.array(-4.0), 0.5) < 0.05
    assert one_weight_ratio(np.array(-4.0), 1.0) > 1
    assert one_weight_ratio(np.array(0.0), 0.5) > 1


def test_in_many_features_noise_drawn_in_outputs_dilutes_the_difference():
    """A weight's own share of an output's noise is 1/D, so its alpha counts less."""
    x = torch.randn(50, 400, dtype=torch.float64)
    loc = torch.randn(400, dtype=torch.float64)
    log_alpha = torch.full_like(loc, 2.0)
    y = x @ loc
    ratios = {}
    for local in (False, True):
        variances = linear_gradient_variance(x, y, loc, log_alpha, local=local)
        ratios[local] = float((variances.multiplicative / variances.additive).median())
    assert ratios[False] == pytest.approx(1 + np.exp(2.0), rel=0.05)
    assert ratios[True] < 1.1


def test_few_draws_and_zero_means_are_refused(regression):
    x, y, loc, log_alpha = regression
    with pytest.raises(ValueError, match="num_draws must be at least 2, got 1"):
        measure(x, y, loc, log_alpha, local=True, num_draws=1)
    with pytest.raises(ValueError, match='loc of "w" has zeros'):
        measure(x, y, loc * 0, log_alpha, local=True, num_draws=2)


@pytest.fixture(scope="module")
def small():
    return compare_noise(
        log_alpha=(-6, 0, 4), own_bins=(-6, 0, 6), epochs=(4, 8), minibatches=2, num_draws=10
    )


def test_the_claim_on_a_network(small):
    """Additive noise is far quieter for large alpha, the same for small, and outputs are quieter.

    Bounds are wide: 20 draws in all, averaged over 11,900 weights, on a short training.
    """
    ratio = {local: v[0] / v[1] for local, v in small.shared.items()}
    for local in (False, True):
        assert ratio[local][0] == pytest.approx(1, abs=0.1)
        assert ratio[local][2] > 3
        assert ratio[local][1] < ratio[local][2]
    assert (ratio[True][1:] < ratio[False][1:]).all()
    assert ratio[False][1] == pytest.approx(2, rel=0.3)
    assert (small.shared[True] < small.shared[False]).all()
    assert small.minibatch > 0


def test_the_fitted_network_fills_its_bins_with_ordered_quartiles(small):
    assert small.own_log_alpha.tolist() == [-3, 3]
    assert small.num_weights.sum() <= 64 * 100 + 100 * 50 + 50 * 10
    assert (small.num_weights > 0).any()
    for low, median, high in (quartiles for quartiles in small.ratio.values()):
        filled = small.num_weights > 0
        assert (np.isfinite(median) == filled).all()
        assert ((low <= median) & (median <= high))[filled].all()


def test_a_seed_gives_the_same_numbers_and_leaves_the_global_state(small):
    before = torch.get_rng_state()
    again = compare_noise(
        log_alpha=(-6, 0, 4), own_bins=(-6, 0, 6), epochs=(4, 8), minibatches=2, num_draws=10
    )
    assert torch.equal(before, torch.get_rng_state())
    for local in (False, True):
        np.testing.assert_allclose(again.shared[local], small.shared[local], rtol=1e-6)


@pytest.fixture
def made_up():
    grid = np.array([-2.0, 0.0, 2.0])
    rows = np.array([[1.0, 4.0, 90.0], [1.0, 2.0, 9.0], [0.1, 0.2, 0.3]])
    ratio = np.array([[1.0, np.nan], [2.0, np.nan], [3.0, np.nan]])
    return NoiseComparison(
        log_alpha=grid,
        shared={False: rows, True: 0.5 * rows},
        minibatch=0.7,
        own_log_alpha=np.array([-1.0, 1.0]),
        num_weights=np.array([5.0, 0.0]),
        ratio={False: ratio, True: ratio + 1},
    )


def test_rows_hold_every_setting(made_up):
    rows = made_up.rows()
    assert len(rows) == 2 * (3 + 2) + 3 * len(PROGRESS)
    assert rows[2] == {
        "setting": "all weights alike",
        "noise": "drawn in weights",
        "log_alpha": 2.0,
        "ratio": 10.0,
        "multiplicative": 90.0,
        "additive": 9.0,
        "log_sigma2": 0.3,
        "minibatch": 0.7,
    }
    assert (rows[3]["ratio_25"], rows[3]["ratio"], rows[3]["ratio_75"]) == (1.0, 2.0, 3.0)
    assert rows[3]["num_weights"] == 5.0
    assert rows[-1]["setting"] == "one weight, at the optimum"
    assert rows[-1]["ratio"] == pytest.approx(1 + np.exp(4.0))


def test_the_figure_shows_the_numbers(made_up):
    variances, shared, own, one = plot_noise(made_up).axes
    drawn = [line.get_ydata() for line in variances.lines]
    np.testing.assert_array_equal(
        drawn[:4], [*made_up.shared[False][:2], *made_up.shared[True][:2]]
    )
    assert set(drawn[4]) == {0.7}
    np.testing.assert_array_equal(shared.lines[0].get_ydata(), [1, 2, 10])
    np.testing.assert_array_equal(own.lines[1].get_ydata(), [3, np.nan])
    assert len(one.lines) == len(PROGRESS) + 1
    for ax in (variances, shared, own, one):
        assert ax.get_yscale() == "log"
        assert "log α" in ax.get_xlabel()
        assert "variance" in ax.get_ylabel()


def test_without_a_result_the_figure_measures_one(made_up, monkeypatch):
    monkeypatch.setattr(module, "compare_noise", lambda: made_up)
    assert len(plot_noise().axes) == 4
