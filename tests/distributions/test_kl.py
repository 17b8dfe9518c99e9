from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, get_args

import mpmath as mp
import pyro
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bayes_svdo.distributions.kl import (
    Approximation,
    _LogAlpha,
    kl_empirical_bayes,
    kl_log_uniform,
    log_alpha,
)
from bayes_svdo.distributions.special import fused

APPROXIMATIONS: tuple[Approximation, ...] = get_args(Approximation)
EVERYWHERE = [name for name in APPROXIMATIONS if name != "kingma2015"]
DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: lambda x, name=name: kl_log_uniform(x, name) for name in EVERYWHERE},
    "empirical_bayes": kl_empirical_bayes,
}
GRID = torch.linspace(-30, 30, 12_001, dtype=torch.float64)

every_divergence = pytest.mark.parametrize("kl", DIVERGENCES.values(), ids=DIVERGENCES)


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


# --- log_alpha


@pytest.fixture(params=["alone", "fused"])
def either_form(request: pytest.FixtureRequest) -> Iterator[None]:
    """As it is computed alone, and as part of a kernel."""
    with fused() if request.param == "fused" else nullcontext():
        yield


both_forms = pytest.mark.usefixtures("either_form")


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_alpha_is_its_definition_from_zero_to_the_largest_number(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    exponents = torch.linspace(math.log(limits.tiny), math.log(limits.max), 401).double()
    sizes = torch.cat([torch.zeros(1), exponents[:-1].exp()]).to(dtype)
    loc = torch.cat([sizes, -sizes])
    log_sigma2 = torch.full_like(loc, -10.0)
    expected = [-10 - mp.log(mp.mpf(x) ** 2 + mp.mpf(limits.tiny)) for x in loc.tolist()]
    result = log_alpha(loc, log_sigma2)
    # Rounding of the logarithm and of the difference, each half a unit of up to 1024.
    torch.testing.assert_close(
        result, torch.tensor([float(e) for e in expected], dtype=dtype), rtol=4e-7, atol=1e-6
    )


@both_forms
@every_divergence
@pytest.mark.parametrize("size", [1e-9, 1e-14, 1e-19, 1e-25, 1e-31, 1e-38, 0.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_gradient_of_a_vanishing_weight_is_loc_over_sigma2(
    kl: Callable[[Tensor], Tensor], size: float, sign: int
) -> None:
    """F1: log(loc²) alone gives 0 · inf = NaN once loc² underflows, below 1e-22 in float32."""
    loc = torch.tensor(sign * size, requires_grad=True)
    log_sigma2 = torch.tensor(-10.0, requires_grad=True)
    kl(log_alpha(loc, log_sigma2)).backward()
    torch.testing.assert_close(loc.grad, loc.detach() / math.exp(-10), rtol=1e-5, atol=0)
    assert log_sigma2.grad.isfinite()


@both_forms
@every_divergence
def test_curvature_at_a_zero_weight_is_the_precision(kl: Callable[[Tensor], Tensor]) -> None:
    loc = torch.zeros((), dtype=torch.float64, requires_grad=True)
    log_sigma2 = torch.tensor(-3.0, dtype=torch.float64)
    (first,) = torch.autograd.grad(kl(log_alpha(loc, log_sigma2)), loc, create_graph=True)
    (second,) = torch.autograd.grad(first, loc)
    assert second.item() == pytest.approx(math.exp(3), rel=1e-10)


@both_forms
@every_divergence
@pytest.mark.parametrize("size", [1e3, 1e10, 1e20, 1e30, 3e38])
def test_gradient_of_a_huge_weight_is_one_over_loc(
    kl: Callable[[Tensor], Tensor], size: float
) -> None:
    loc = torch.tensor(size, requires_grad=True)
    kl(log_alpha(loc, torch.tensor(-10.0))).backward()
    assert loc.grad.item() == pytest.approx(1 / size, rel=1e-6)


def smallest_weight_under_adam(kl_of: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """64 weights without data, 1,200 steps of Adam on their KL alone."""
    loc = (0.3 * torch.randn(64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    log_sigma2 = torch.full((64,), -4.0, requires_grad=True)
    optimizer = torch.optim.Adam([loc, log_sigma2], lr=5e-3)
    smallest = torch.tensor(torch.inf)
    for _ in range(1200):
        optimizer.zero_grad()
        kl_of(loc, log_sigma2).sum().backward()
        optimizer.step()
        smallest = torch.minimum(smallest, loc.detach().abs().min())
    return loc.detach(), smallest


def test_training_stays_finite_where_the_naive_logarithm_fails() -> None:
    def naive(loc: Tensor, log_sigma2: Tensor) -> Tensor:
        return kl_log_uniform(log_sigma2 - torch.log(loc**2))

    loc, _ = smallest_weight_under_adam(naive)
    assert loc.isnan().any()
    loc, smallest = smallest_weight_under_adam(
        lambda loc, log_sigma2: kl_log_uniform(log_alpha(loc, log_sigma2))
    )
    assert loc.isfinite().all()
    assert smallest < 1e-22  # the regime in which loc² underflows was visited


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_log_alpha_is_computed_in_float32(dtype: torch.dtype) -> None:
    loc = torch.tensor([0.0, 1e-4, 0.5, 300.0], dtype=dtype)  # 300² overflows in float16
    log_sigma2 = torch.tensor([-10.0, -20.0, 0.0, 1.0], dtype=dtype)
    result = log_alpha(loc, log_sigma2)
    assert torch.equal(result, log_alpha(loc.float(), log_sigma2.float()).to(dtype))
    assert result.isfinite().all()


def test_log_alpha_broadcasts_and_promotes() -> None:
    loc = torch.randn(3, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    log_sigma2 = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    result = log_alpha(loc, log_sigma2)
    assert result.shape == (3, 4)
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, (-2 * loc.abs().double().log()).expand(3, 4))
    result.sum().backward()
    assert loc.grad.shape == (3, 1)
    torch.testing.assert_close(log_sigma2.grad, torch.full((4,), 3.0, dtype=torch.float64))


def test_log_alpha_needs_only_the_gradients_asked_for() -> None:
    log_sigma2 = torch.zeros(2, requires_grad=True)
    log_alpha(torch.ones(2), log_sigma2).sum().backward()
    torch.testing.assert_close(log_sigma2.grad, torch.ones(2))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("loc", (torch.tensor([1]), torch.tensor([1.0]))),
        ("log_sigma2", (torch.tensor([1.0]), torch.tensor([1]))),
    ],
)
def test_log_alpha_refuses_integers(name: str, arguments: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a floating-point tensor.*int64"):
        log_alpha(*arguments)


@both_forms
def test_log_alpha_passes_gradcheck() -> None:
    loc = torch.tensor([-2.0, -0.3, 0.05, 1.0], dtype=torch.float64, requires_grad=True)
    log_sigma2 = torch.linspace(-9, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_alpha, (loc, log_sigma2), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(log_alpha, (loc, log_sigma2), check_batched_grad=True)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's
def test_log_alpha_and_its_gradient_go_into_one_graph_of_torch_compile() -> None:
    loc = torch.tensor([-2.0, 0.0, 1e-30, 1e15], requires_grad=True)
    log_sigma2 = torch.linspace(-9, 3, 4)
    checks = "validate_distributions_torch"  # which torch.compile turns off for good
    with pyro.settings.context(**{checks: pyro.settings.get(checks)}):
        compiled = torch.compile(
            lambda *x: _LogAlpha.apply(*x), backend="aot_eager", fullgraph=True
        )
        found = compiled(loc, log_sigma2)
        found.sum().backward()
    torch.testing.assert_close(found, log_alpha(loc, log_sigma2), rtol=1e-6, atol=0)
    torch.testing.assert_close(loc.grad, -2 * loc.detach() / (loc.detach() ** 2 + 1.1754944e-38))


@both_forms
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
def test_log_alpha_under_vmap(in_dims: tuple[int | None, int | None]) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = [torch.randn(5, 3, generator=generator) for _ in range(2)]
    arguments = [x if dim == 0 else x[0] for x, dim in zip(batch, in_dims, strict=True)]
    torch.testing.assert_close(
        vmap(log_alpha, in_dims=in_dims)(*arguments), log_alpha(*arguments).expand(5, 3)
    )
    gradient = vmap(grad(lambda *args: log_alpha(*args).sum(), argnums=(0, 1)), in_dims=in_dims)
    torch.testing.assert_close(gradient(*arguments)[0], (-2 / arguments[0]).expand(5, 3))


# --- the divergences


@pytest.mark.parametrize(
    ("name", "kl_error", "slope_error"),
    [("molchanov2017", 0.0094, 0.0138), ("poster2016", 0.0129, 0.0194)],
)
def test_approximation_is_within_the_documented_error(
    name: Approximation, kl_error: float, slope_error: float
) -> None:
    assert_largest_error(GRID, name, kl_error, slope_error)


def test_kingma_is_within_the_documented_error_for_alpha_up_to_one() -> None:
    assert_largest_error(GRID[GRID <= 0], "kingma2015", 0.0404, 0.0540)


def assert_largest_error(
    grid: Tensor, name: Approximation, kl_error: float, slope_error: float
) -> None:
    """Neither above the claim nor 2 % below it."""
    kl = kl_log_uniform(grid, name) - kl_log_uniform(grid, "exact")
    assert 0.98 * kl_error < kl.abs().max() < kl_error
    difference = slope(lambda x: kl_log_uniform(x, name), grid) - slope(
        lambda x: kl_log_uniform(x, "exact"), grid
    )
    assert 0.98 * slope_error < difference.abs().max() < slope_error


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("molchanov2017", lambda la: 0.63576 / (1 + mp.exp(-(1.87320 + 1.48695 * la)))),
        ("poster2016", lambda la: 0.64 / (1 + mp.exp(-1.5 * (1.3 + la)))),
    ],
)
def test_sigmoid_approximations_are_as_published(
    name: Approximation, published: Callable[[mp.mpf], mp.mpf]
) -> None:
    """-KL = k1 sigmoid(k2 + k3 la) - log(1 + 1/alpha)/2 - k1."""
    k1 = published(mp.mpf(1000))
    grid = GRID[::100]
    with mp.workdps(40):
        expected = [
            float(k1 - published(mp.mpf(la)) + mp.log1p(mp.exp(-mp.mpf(la))) / 2)
            for la in grid.tolist()
        ]
    torch.testing.assert_close(
        kl_log_uniform(grid, name),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )


def test_default_is_molchanov2017() -> None:
    assert torch.equal(kl_log_uniform(GRID), kl_log_uniform(GRID, "molchanov2017"))


@every_divergence
def test_kl_tends_to_zero_as_one_over_two_alpha(kl: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([20.0, 25.0, 30.0], dtype=torch.float64)
    torch.testing.assert_close(kl(x), 0.5 * torch.exp(-x), rtol=1e-4, atol=0)
    assert kl(torch.tensor([1e4, torch.inf])).tolist() == [0, 0]


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nothing_overflows(kl: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """F2: log1p(exp(-log_alpha)) is inf below -11.1 in float16 and below -88.7 in float32."""
    x = torch.tensor([-1e4, -200.0, -12.0, 0.0, 12.0, 200.0, 1e4], dtype=dtype, requires_grad=True)
    value = kl(x)
    assert value.dtype == dtype
    assert value.isfinite().all()
    value.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[0].item() == pytest.approx(-0.5, rel=2e-7)  # one rounding of float32
    edges = kl(torch.tensor([-torch.inf, torch.nan], dtype=dtype))
    assert edges[0] == torch.inf
    assert edges[1].isnan()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(
    kl: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = torch.linspace(-10, 10, 101).to(dtype)
    assert torch.equal(kl(x), kl(x.float()).to(dtype))


@every_divergence
def test_no_weight_is_cut_off_from_its_gradient(kl: Callable[[Tensor], Tensor]) -> None:
    """F5: with a clamp to [-10, 10], weights that start outside never move."""
    assert (slope(kl, torch.linspace(-80, 80, 1001)) < -1e-36).all()


@every_divergence
@settings(deadline=None)
@given(start=st.floats(-30, 30), step=st.floats(0.01, 4.0))
def test_kl_falls_as_noise_grows(kl: Callable[[Tensor], Tensor], start: float, step: float) -> None:
    x = torch.tensor([start, start + step], dtype=torch.float64)
    low, high = kl(x)
    assert low > high


@every_divergence
def test_derivatives_pass_gradcheck(kl: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-9, 9, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(kl, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(kl, x, check_batched_grad=True)


@every_divergence
def test_gradient_is_the_same_with_and_without_a_graph(kl: Callable[[Tensor], Tensor]) -> None:
    """The slope kept for the first derivative is the one differentiated for the second."""
    x = GRID[::50].clone().requires_grad_()
    (plain,) = torch.autograd.grad(kl(x).sum(), x)
    (graphed,) = torch.autograd.grad(kl(x).sum(), x, create_graph=True)
    torch.testing.assert_close(plain, graphed, rtol=1e-12, atol=0)


@every_divergence
def test_transforms_of_torch_func_agree_with_autograd(kl: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-4, 4, 6, dtype=torch.float64)
    assert torch.equal(vmap(kl)(x.reshape(2, 3)), kl(x).reshape(2, 3))
    torch.testing.assert_close(vmap(grad(kl))(x), slope(kl, x))
    hessian = jacrev(jacrev(lambda z: kl(z).sum()))(x)
    torch.testing.assert_close(hessian, slope(lambda z: vmap(grad(kl))(z), x).diag())


@every_divergence
def test_value_and_gradients_are_traced_by_make_fx(kl: Callable[[Tensor], Tensor]) -> None:
    def objective(loc: Tensor, log_sigma2: Tensor) -> tuple[Tensor, ...]:
        total = kl(log_alpha(loc, log_sigma2)).sum()
        return total, *torch.autograd.grad(total, (loc, log_sigma2))

    generator = torch.Generator().manual_seed(0)
    traced = make_fx(objective)(*(torch.randn(5).requires_grad_() for _ in range(2)))
    fresh = [torch.randn(5, generator=generator, requires_grad=True) for _ in range(2)]
    for got, expected in zip(traced(*fresh), objective(*fresh), strict=True):
        torch.testing.assert_close(got, expected)


def test_exact_kl_in_loc_is_dawsons_function() -> None:
    """dKL/dloc = sqrt(2) D(loc / (sqrt(2) sigma)) / sigma, smooth through loc = 0."""
    loc = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    sigma = 0.4
    log_sigma2 = torch.full_like(loc, 2 * math.log(sigma)).detach()
    kl_log_uniform(log_alpha(loc, log_sigma2), "exact").sum().backward()
    expected = math.sqrt(2) / sigma * special.dawsn(loc.detach().numpy() / math.sqrt(2) / sigma)
    torch.testing.assert_close(loc.grad, torch.from_numpy(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 8.0])
def test_exact_kl_matches_monte_carlo(alpha: float) -> None:
    """KL = C - log(alpha)/2 + E log|eps|; 5 standard errors, 4 cases: 1 failure in 4e5 seeds."""
    generator = torch.Generator().manual_seed(7)
    eps = 1 + math.sqrt(alpha) * torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    draws = eps.abs().log()
    constant = (float(mp.euler) + math.log(2)) / 2
    estimate = constant - 0.5 * math.log(alpha) + draws.mean().item()
    standard_error = draws.std().item() / 1000
    exact = kl_log_uniform(torch.tensor(math.log(alpha), dtype=torch.float64), "exact").item()
    assert abs(estimate - exact) < 5 * standard_error


def test_empirical_bayes_is_half_log_one_plus_one_over_alpha() -> None:
    with mp.workdps(40):
        expected = [float(mp.log1p(mp.exp(-mp.mpf(la))) / 2) for la in GRID[::100].tolist()]
    torch.testing.assert_close(
        kl_empirical_bayes(GRID[::100]),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-14,
        atol=0,
    )


# --- Kingma's cubic and the errors


def test_kingma_agrees_with_the_exact_kl_for_small_alpha() -> None:
    x = torch.tensor([-30.0, -20.0, -12.0], dtype=torch.float64)
    torch.testing.assert_close(
        kl_log_uniform(x, "kingma2015"), kl_log_uniform(x, "exact"), rtol=0, atol=1e-4 / 12
    )
    assert kl_log_uniform(torch.tensor(-torch.inf), "kingma2015") == torch.inf


def test_kingma_is_the_published_cubic() -> None:
    alpha = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    cubic = 1.16145124 * alpha - 1.50204118 * alpha**2 + 0.58629921 * alpha**3
    minus_kl = 0.5 * alpha.log() + cubic
    difference = kl_log_uniform(alpha.log(), "kingma2015") + minus_kl
    torch.testing.assert_close(difference, torch.full_like(alpha, 0.63518142273073908501))


def test_kingma_refuses_alpha_above_one() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 2.25, torch.nan])
    with pytest.raises(
        ValueError, match=r"(?s)kingma2015.*alpha <= 1.*2 of 5.*2\.25.*molchanov2017.*extrapolate"
    ):
        kl_log_uniform(x, "kingma2015")
    assert kl_log_uniform(x[[0, 1, 4]], "kingma2015")[:2].isfinite().all()


def test_kingma_extrapolates_when_told_to() -> None:
    """The cubic as it stands: below zero at alpha = 2, where the exact KL is 0.27."""
    x = torch.tensor([0.0, math.log(2.0)], dtype=torch.float64, requires_grad=True)
    value = kl_log_uniform(x, "kingma2015", extrapolate=True)
    assert value[0].item() == pytest.approx(0.38947, abs=1e-5)
    assert value[1] < 0
    assert torch.autograd.gradcheck(lambda x: kl_log_uniform(x, "kingma2015", extrapolate=True), x)


@pytest.mark.parametrize(
    ("name", "closest"),
    [("molchanov", "molchanov2017"), ("exakt", "exact"), ("poster", "poster2016")],
)
def test_unknown_approximation_names_the_closest(name: str, closest: str) -> None:
    with pytest.raises(
        ValueError, match=rf'"{name}"\. Did you mean "{closest}"\? Known: exact, .*kingma2015'
    ):
        kl_log_uniform(torch.zeros(1), name)


def test_unknown_approximation_with_nothing_close_lists_all() -> None:
    with pytest.raises(ValueError, match=r'KL "None"\. Known: exact, .*, kingma2015\.$'):
        kl_log_uniform(torch.zeros(1), None)


@every_divergence
def test_integers_are_refused(kl: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match=r"log_alpha must be a floating-point tensor.*int64"):
        kl(torch.tensor([1, 2]))


@pytest.mark.parametrize("value", [1.0, 1, None, [1.0]])
def test_what_is_no_tensor_is_named(value: Any) -> None:
    message = "must be a floating-point tensor, got "
    for name in APPROXIMATIONS:
        with pytest.raises(TypeError, match="log_alpha " + message):
            kl_log_uniform(value, name)
    with pytest.raises(TypeError, match="log_alpha " + message):
        kl_empirical_bayes(value)
    with pytest.raises(TypeError, match="loc " + message):
        log_alpha(value, torch.zeros(()))
    with pytest.raises(TypeError, match="log_sigma2 " + message):
        log_alpha(torch.zeros(()), value)
