"""A pruned posterior is the masked one, computed on what is left of it."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import kl_divergence

from bayes_svdo.distributions import AdditiveNoiseNormal, LogUniform, UndrawnSample
from bayes_svdo.distributions.pruned import PRUNED_LOG_SIGMA2, Block, PrunedAdditiveNoiseNormal


@pytest.fixture
def keep():
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[1], mask[4] = False, False
    mask[:, 2], mask[:, 7] = False, False
    return mask


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(1)
    loc = torch.randn(6, 9, dtype=torch.float64, generator=generator)
    log_sigma2 = torch.randn(6, 9, dtype=torch.float64, generator=generator) - 2
    return loc.requires_grad_(), log_sigma2.requires_grad_()


def masked(parameters, keep):
    loc, log_sigma2 = parameters
    return AdditiveNoiseNormal(loc.where(keep, 0.0), log_sigma2.where(keep, PRUNED_LOG_SIGMA2))


def test_the_block_leaves_out_exactly_the_dead_rows_and_columns(keep):
    block = Block.of(keep)
    assert block.rows.tolist() == keep.any(1).nonzero().flatten().tolist()
    assert block.columns.tolist() == keep.any(0).nonzero().flatten().tolist()
    assert not {1, 4} & set(block.rows.tolist())
    assert not {2, 7} & set(block.columns.tolist())
    assert int(block.gather(keep).sum()) == int(keep.sum())
    assert block.numel() == block.gather(keep).numel()


def test_it_is_the_masked_distribution(parameters, keep):
    pruned = PrunedAdditiveNoiseNormal(*parameters, keep, Block.of(keep))
    expected = masked(parameters, keep)
    assert torch.equal(pruned.loc, expected.loc)
    assert torch.equal(pruned.log_sigma2, expected.log_sigma2)
    value = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(pruned.log_prob(value), expected.log_prob(value))
    assert pruned.like().shape == pruned.loc.shape
    assert pruned.like().dtype == torch.float64


@pytest.mark.parametrize("kl", ["exact", "molchanov2017"])
def test_kl_and_its_gradient_are_those_of_the_kept_weights(parameters, keep, kl):
    pruned = PrunedAdditiveNoiseNormal(*parameters, keep, Block.of(keep))
    kl_pruned = kl_divergence(pruned.to_event(2), LogUniform(kl).expand((6, 9)).to_event(2))
    kept = AdditiveNoiseNormal(*(value[keep] for value in parameters))
    kl_kept = kl_divergence(kept, LogUniform(kl)).sum()
    torch.testing.assert_close(kl_pruned, kl_kept)
    gradients = torch.autograd.grad(kl_pruned, parameters)
    for got, wanted in zip(gradients, torch.autograd.grad(kl_kept, parameters), strict=True):
        torch.testing.assert_close(got, wanted)
        assert not got[~keep].any()


@pytest.mark.parametrize("bias", [None, torch.arange(6, dtype=torch.float64)], ids=["no", "bias"])
def test_linear_has_the_moments_of_the_masked_weights(parameters, keep, bias):
    """Means and variances of 200,000 draws: 5.5 standard errors, fails once in 2e6 runs."""
    torch.manual_seed(0)
    x = torch.randn(1, 9, dtype=torch.float64)
    num_draws = 200_000
    with torch.no_grad():
        weight = UndrawnSample.of(PrunedAdditiveNoiseNormal(*parameters, keep, Block.of(keep)))
        output = F.linear(x.expand(num_draws, -1), weight, bias)
        q = masked(parameters, keep)
        mean = F.linear(x, q.loc, bias)[0]
        variance = F.linear(x.square(), q.variance)[0]
    error = (output.mean(0) - mean).abs()
    assert (error <= 5.5 * (variance / num_draws).sqrt() + 1e-10).all()
    spread = (output.var(0) - variance).abs()
    assert (spread <= 5.5 * variance * (2 / num_draws) ** 0.5 + 1e-10).all()


def test_dead_outputs_are_the_bias_and_any_leading_shape_goes(parameters, keep):
    weight = UndrawnSample.of(PrunedAdditiveNoiseNormal(*parameters, keep, Block.of(keep)))
    output = F.linear(torch.randn(2, 3, 9, dtype=torch.float64), weight, torch.ones(6).double())
    assert output.shape == (2, 3, 6)
    assert (output[..., [1, 4]] == 1).all()


def test_a_matrix_without_weights_is_its_bias(parameters):
    nothing = torch.zeros(6, 9, dtype=torch.bool)
    weight = UndrawnSample.of(PrunedAdditiveNoiseNormal(*parameters, nothing, Block.of(nothing)))
    output = F.linear(torch.randn(4, 9, dtype=torch.float64), weight)
    assert output.shape == (4, 6)
    assert not output.any()
    output.sum().backward()
    assert not parameters[0].grad.any()


def test_other_uses_draw_a_weight_that_is_zero_where_pruned(parameters, keep):
    torch.manual_seed(0)
    weight = UndrawnSample.of(PrunedAdditiveNoiseNormal(*parameters, keep, Block.of(keep)))
    drawn = weight + 0
    assert drawn[~keep].abs().max() < 1e-12
    assert (drawn[keep] != parameters[0][keep]).all()


def test_expanding_gives_an_ordinary_distribution(parameters, keep):
    pruned = PrunedAdditiveNoiseNormal(*parameters, keep, Block.of(keep))
    assert pruned.expand((6, 9)) is pruned
    expanded = pruned.expand((2, 6, 9))
    assert expanded.batch_shape == (2, 6, 9)
    assert torch.equal(expanded.loc[1], pruned.loc)
