"""Moments of the output, without drawing."""

from __future__ import annotations

import math
from collections import OrderedDict
from itertools import pairwise

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn

from bayes_svdo.analysis.moments import (
    Moments,
    draws_by_moments,
    linear,
    output_moments,
    rectified_gaussian,
)
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior
from bayes_svdo.models import BayesianNetwork, Gaussian

DRAWS = 200_000


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def posterior_of(net: nn.Module, where=None) -> Posterior:
    torch.manual_seed(1)
    model = BayesianNetwork(net, Gaussian(), num_data=10, where=where)
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        for log_sigma2 in guide.sigma_parameters():
            log_sigma2.copy_(2 * torch.rand_like(log_sigma2) - 2.5)
    return Posterior(model, guide)


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(2)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def outputs_by_hand(posterior: Posterior, x: Tensor, draws: int = DRAWS) -> Tensor:
    """The outputs of many networks for one input, (draws, out), every weight drawn."""
    generator = torch.Generator().manual_seed(3)
    h = x.double().expand(draws, -1)
    for name, module in posterior.model.net.named_children():
        if isinstance(module, nn.Linear):
            loc, log_sigma2 = (v.double() for v in posterior.guide.parameters_of(f"{name}.weight"))
            out = torch.empty(draws, len(loc), dtype=torch.float64)
            for unit in range(len(loc)):
                noise = torch.randn(draws, loc.shape[1], generator=generator, dtype=torch.float64)
                w = loc[unit] + (0.5 * log_sigma2[unit]).exp() * noise
                out[:, unit] = (h * w).sum(1) + module.bias[unit].double()
            h = out
        else:
            h = module(h)
    return h.detach()


@pytest.mark.parametrize("mean", [-6.0, -1.5, 0.0, 0.3, 2.0, 9.0])
@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
def test_rectified_moments_are_those_of_quadrature(mean, std):
    result = rectified_gaussian(
        torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64) ** 2
    )
    density = stats.norm(mean, std).pdf
    upper = max(mean, 0.0) + 12 * std
    first, second = (
        integrate.quad(
            lambda z, k=k: z**k * density(z), 0, upper, points=[max(mean, 0.0)], epsabs=0, limit=200
        )[0]
        for k in (1, 2)
    )
    assert float(result.mean) == pytest.approx(first, rel=1e-7, abs=1e-300)
    assert float(result.variance) == pytest.approx(second - first**2, rel=1e-6, abs=1e-300)


def test_rectified_moments_far_out_are_those_of_the_gaussian_or_zero():
    mean = torch.tensor([1e9, -1e9, 50.0, -50.0], dtype=torch.float64)
    result = rectified_gaussian(mean, torch.full_like(mean, 4.0))
    torch.testing.assert_close(result.mean, mean.clamp(min=0))
    expected = torch.tensor([4.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(result.variance, expected, rtol=1e-12, atol=1e-100)


def test_a_variance_of_zero_rectifies_the_mean():
    mean = torch.tensor([2.0, -1.0, 0.0], dtype=torch.float64)
    result = rectified_gaussian(mean, torch.zeros_like(mean))
    assert result.mean.tolist() == [2.0, 0.0, 0.0]
    assert result.variance.tolist() == [0.0, 0.0, 0.0]


def test_rectified_variance_is_never_negative():
    mean = torch.linspace(-45, 45, 20001, dtype=torch.float64)
    result = rectified_gaussian(mean, torch.ones_like(mean))
    assert result.variance.min() >= 0
    assert result.mean.min() >= 0


def test_a_product_of_independent_factors_has_its_exact_variance():
    """var(wx) = E[w²] E[x²] - E[w]² E[x]²."""
    x = Moments(torch.tensor([[3.0]]), torch.tensor([[0.5]]))
    w = Moments(torch.tensor([[-2.0]]), torch.tensor([[0.25]]))
    b = Moments(torch.tensor([1.0]), torch.tensor([0.125]))
    result = linear(x, w, b)
    assert float(result.mean) == -5.0
    assert float(result.variance) == pytest.approx(4.25 * 9.5 - 36 + 0.125)


def test_linear_networks_are_exact():
    posterior = posterior_of(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 3)))
    x = inputs(5, 2, 3)
    mean, variance = output_moments(posterior, x)
    loc, log_sigma2 = posterior.guide.parameters_of("2.weight")
    flat = x.flatten(1)
    bias = posterior.model.net.get_submodule("2").bias
    torch.testing.assert_close(mean.float(), flat @ loc.T + bias)
    torch.testing.assert_close(variance.float(), flat.square() @ log_sigma2.exp().T)
    assert mean.dtype == torch.float64


def test_two_linear_layers_without_a_rectifier_are_exact():
    posterior = posterior_of(nn.Sequential(OrderedDict(a=nn.Linear(3, 4), b=nn.Linear(4, 2))))
    x = inputs(1, 3)
    mean, variance = output_moments(posterior, x)
    _agree(outputs_by_hand(posterior, x[0]), mean[0], variance[0])


def test_one_hidden_layer_agrees_with_monte_carlo_over_weights():
    """5 standard errors of each of 2 x 3 numbers: fails by chance once in 3e5 runs."""
    posterior = posterior_of(mlp(4, 8, 3))
    x = inputs(1, 4)
    mean, variance = output_moments(posterior, x)
    _agree(outputs_by_hand(posterior, x[0]), mean[0], variance[0])


def test_two_hidden_layers_are_close():
    posterior = posterior_of(mlp(4, 20, 20, 2))
    x = inputs(1, 4)
    mean, variance = output_moments(posterior, x)
    drawn = outputs_by_hand(posterior, x[0], 20_000)
    std = drawn.std(0)
    assert (mean[0] - drawn.mean(0)).abs().max() < 0.1 * std.max()
    assert ((variance[0] / drawn.var(0)).log().abs() < 0.25).all()


def _agree(drawn: Tensor, mean: Tensor, variance: Tensor) -> None:
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - mean).abs() < 5 * error).all()
    centred = (drawn - drawn.mean(0)).square()
    error = centred.std(0) / math.sqrt(len(drawn))
    assert ((centred.mean(0) - variance).abs() < 5 * error).all()


def test_point_estimates_have_no_variance():
    posterior = posterior_of(mlp(4, 8, 3), where="2.weight")
    x = inputs(5, 4)
    mean, variance = output_moments(posterior, x)
    net = posterior.model.net
    hidden = torch.relu(net[0](x)).detach()
    loc, log_sigma2 = posterior.guide.parameters_of("2.weight")
    torch.testing.assert_close(mean.float(), (hidden @ loc.T + net[2].bias).detach())
    torch.testing.assert_close(variance.float(), hidden.square() @ log_sigma2.exp().T)


def test_biases_with_a_prior_add_their_variance():
    posterior = posterior_of(nn.Sequential(nn.Linear(3, 2)), where="*.bias")
    _, variance = output_moments(posterior, inputs(4, 3))
    log_sigma2 = posterior.guide.parameters_of("0.bias")[1]
    torch.testing.assert_close(variance.float(), log_sigma2.exp().expand(4, 2))


def test_layers_without_a_bias_and_nested_ones():
    first, last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2)
    flat = posterior_of(nn.Sequential(first, nn.ReLU(), last))
    inner = nn.Sequential(first, nn.ReLU())
    nested = posterior_of(nn.Sequential(inner, nn.Identity(), last))
    x = inputs(5, 3)
    for a, b in zip(output_moments(nested, x), output_moments(flat, x), strict=True):
        assert torch.equal(a, b)


def test_a_lone_linear_layer_will_do():
    posterior = posterior_of(nn.Linear(3, 2))
    assert output_moments(posterior, inputs(4, 3)).mean.shape == (4, 2)


def test_pruned_weights_have_no_variance():
    posterior = posterior_of(nn.Linear(3, 2))
    posterior.guide.prune_(-100.0)
    mean, variance = output_moments(posterior, inputs(4, 3))
    torch.testing.assert_close(mean.float(), posterior.model.net.bias.detach().expand(4, 2))
    assert variance.max() < 1e-20


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), '"1" is a Tanh'),
        (nn.Sequential(OrderedDict(block=Residual())), '"block" is a Residual'),
        (Residual(), "the net is a Residual"),
        (nn.Sequential(Doubled(3, 3)), '"0" is a Doubled'),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "original"),
    ],
)
def test_other_modules_are_named(net, words):
    with pytest.raises(TypeError, match=words):
        output_moments(posterior_of(net), inputs(4, 3))


def test_a_weight_that_is_used_twice_is_named():
    layer = nn.Linear(3, 3)
    posterior = posterior_of(nn.Sequential(layer, nn.ReLU(), layer))
    with pytest.raises(ValueError, match='each weight once, but "2" has that of "0"'):
        output_moments(posterior, inputs(4, 3))


def test_x_that_does_not_fit_is_explained():
    with pytest.raises(ValueError, match=r'layer "0" needs 3 inputs, but gets 5'):
        output_moments(posterior_of(mlp(3, 4, 2)), inputs(4, 5))


def test_hand_written_models_are_refused(hand_written):
    with pytest.raises(TypeError, match="moment propagation needs a BayesianNetwork"):
        output_moments(hand_written, inputs(4, 3))


@pytest.mark.parametrize("sizes", [(3, 4), (3, 6, 4)])
def test_draws_have_the_covariance_of_the_outputs(sizes):
    posterior = posterior_of(mlp(*sizes))
    with torch.no_grad():  # outputs that depend on little but what they share
        for loc in posterior.guide.location_parameters():
            loc.mul_(3)
        list(posterior.guide.sigma_parameters())[-1].sub_(2)
    x = inputs(1, 3)
    drawn = torch.stack(list(draws_by_moments(posterior, x, 20_000)))[:, 0]
    by_hand = outputs_by_hand(posterior, x, 20_000)
    mean, variance = output_moments(posterior, x)
    error = 5 * (variance[0] / len(drawn)).sqrt()
    assert ((drawn.mean(0) - mean[0]).abs() < error).all()
    scale = variance[0].sqrt()
    expected, found = (value.T.cov() / scale[:, None] / scale for value in (by_hand, drawn))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.06)
    if len(sizes) == 3:
        assert (expected - expected.diagonal().diag()).abs().max() > 0.3  # there is something


def test_positions_are_taken_one_by_one_and_not_flattened():
    posterior = posterior_of(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2)))
    x = inputs(4, 8, 3)
    of_sequence = output_moments(posterior, x)
    alone = output_moments(posterior, x[:, 5])
    torch.testing.assert_close(of_sequence.variance[:, 5], alone.variance)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(48, 1))
    with pytest.raises(ValueError, match=r"Flatten puts side by side .* 8 positions"):
        output_moments(posterior_of(net), x)
    net = nn.Sequential(nn.Flatten(), nn.Linear(24, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 1))
    assert output_moments(posterior_of(net), x).mean.shape == (4, 1)


def test_arrays_of_the_weights_dtype_are_taken():
    posterior = posterior_of(mlp(3, 5, 2))
    x = inputs(4, 3)
    torch.testing.assert_close(output_moments(posterior, x.numpy()), output_moments(posterior, x))
    with pytest.raises(ValueError, match=r"x of dtype torch\.float64.*\n.*dtype=torch\.float32"):
        output_moments(posterior, x.double())
