from __future__ import annotations

from collections.abc import Callable
from functools import cache

import mpmath as mp
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor
from torch.func import grad, jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from bayes_svdo.distributions.special import (
    exact_kl,
    exact_kl_curvature,
    exact_kl_slope,
    softplus,
)

FUNCTIONS = [exact_kl, exact_kl_slope, exact_kl_curvature]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@cache
def reference(log_alpha: float) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    """KL, slope and curvature to 40 digits, from 2F2 and Dawson's function."""
    with mp.workdps(90):  # the curvature loses 26 digits at log_alpha = -30
        la = mp.mpf(log_alpha)
        u = mp.exp(-la) / 2
        h = mp.sqrt(mp.pi * u) / 2 * mp.exp(-u) * mp.erfi(mp.sqrt(u))
        if u < 1000:
            kl = u * mp.hyp2f2(1, 1, mp.mpf(3) / 2, 2, -u)
        else:  # asymptotic series; its smallest term is below e**-1000
            series = (mp.fac2(2 * k - 1) / (2 * k) * mp.exp(k * la) for k in range(1, 40))
            kl = (mp.euler + mp.log(2)) / 2 - la / 2 - mp.fsum(series)
        return kl, -h, (h + u * (1 - 2 * h)) / 2


def grid(dtype: torch.dtype) -> Tensor:
    """[-30, 30] in steps of 1/4 and 200 points off the steps."""
    generator = torch.Generator().manual_seed(0)
    off = 60 * torch.rand(200, generator=generator, dtype=torch.float64) - 30
    return torch.cat([torch.linspace(-30, 30, 241, dtype=torch.float64), off]).to(dtype)


def errors(function: Callable[[Tensor], Tensor], order: int, dtype: torch.dtype) -> list[mp.mpf]:
    """Absolute errors of ``function`` over the grid, exactly."""
    x = grid(dtype)
    return [
        abs(mp.mpf(got) - reference(la)[order])
        for la, got in zip(x.tolist(), function(x).tolist(), strict=True)
    ]


def largest_relative_error(
    function: Callable[[Tensor], Tensor], order: int, dtype: torch.dtype
) -> float:
    truth = [abs(reference(la)[order]) for la in grid(dtype).tolist()]
    pairs = zip(errors(function, order, dtype), truth, strict=True)
    return float(max(error / value for error, value in pairs))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-7), (torch.float64, 1e-13)])
def test_kl_is_within_the_documented_error(dtype: torch.dtype, bound: float) -> None:
    assert largest_relative_error(exact_kl, 0, dtype) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_slope_is_within_the_documented_error(dtype: torch.dtype, bound: float) -> None:
    assert largest_relative_error(exact_kl_slope, 1, dtype) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_autograd_gives_the_slope(dtype: torch.dtype, bound: float) -> None:
    def slope_by_autograd(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(exact_kl(x).sum(), x)[0]

    assert largest_relative_error(slope_by_autograd, 1, dtype) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-7), (torch.float64, 1e-11)])
def test_curvature_is_within_the_documented_error(dtype: torch.dtype, bound: float) -> None:
    """Relative to alpha/(1 + alpha)², its envelope, for it changes sign near -1.5."""
    x = grid(dtype)
    pairs = zip(errors(exact_kl_curvature, 2, dtype), x.tolist(), strict=True)
    assert max(float(e * (1 + mp.exp(la)) ** 2 / mp.exp(la)) for e, la in pairs) < bound


def test_second_derivative_by_autograd_is_the_curvature() -> None:
    x = grid(torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(exact_kl(x).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    assert torch.equal(curvature, exact_kl_curvature(x))


@pytest.mark.parametrize("log_alpha", [-4.0, -1.5, 0.0, 2.5])
def test_formula_is_the_divergence_itself(log_alpha: float) -> None:
    """KL = C - log(alpha)/2 + E log|1 + sqrt(alpha) n|, by quadrature around the singularity."""
    scale = float(mp.exp(log_alpha / 2))
    density = stats.norm(1, scale).pdf

    def integrand(t: float) -> float:  # t = log|eps|, both signs of eps
        size = float(mp.exp(t))
        return t * size * (density(size) + density(-size))

    value, error = integrate.quad(
        integrand, -45, 5, epsabs=1e-12, epsrel=1e-12, limit=400, points=[-1, 0, 1]
    )
    assert error < 1e-10
    expected = (mp.euler + mp.log(2)) / 2 - log_alpha / 2 + value
    kl = exact_kl(torch.tensor(log_alpha, dtype=torch.float64)).item()
    assert kl == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("log_alpha", [-5.0, -2.0, 0.0, 3.0, 8.0])
def test_formula_is_a_poisson_mixture_of_digammas(log_alpha: float) -> None:
    u = float(mp.exp(-log_alpha) / 2)
    j = torch.arange(400).numpy()
    expected = 0.5 * (stats.poisson(u).pmf(j) @ special.digamma(j + 0.5) - special.digamma(0.5))
    kl = exact_kl(torch.tensor(log_alpha, dtype=torch.float64)).item()
    assert kl == pytest.approx(expected, rel=1e-12)


def test_slope_is_dawsons_function() -> None:
    x = grid(torch.float64)
    root_u = torch.exp(-x / 2) / 2**0.5
    expected = -root_u * torch.from_numpy(special.dawsn(root_u.numpy()))
    torch.testing.assert_close(exact_kl_slope(x), expected, rtol=1e-13, atol=0)


def test_steepest_slope_is_where_the_docstring_says() -> None:
    x = torch.linspace(-3, 0, 30_001, dtype=torch.float64)
    slope = exact_kl_slope(x)
    assert slope.min().item() == pytest.approx(-0.642375, abs=5e-7)
    assert x[slope.argmin()].item() == pytest.approx(-1.5067, abs=1e-4)
    assert exact_kl_curvature(torch.tensor(-1.5068)) < 0 < exact_kl_curvature(torch.tensor(-1.5066))


@pytest.mark.parametrize("dtype", DTYPES)
def test_limits(dtype: torch.dtype) -> None:
    inf = float("inf")
    x = torch.tensor([-inf, inf, 1e4, -1e4, float("nan")], dtype=dtype)
    kl, slope, curvature = exact_kl(x), exact_kl_slope(x), exact_kl_curvature(x)
    assert kl.dtype == slope.dtype == curvature.dtype == dtype
    assert kl[:3].tolist() == [inf, 0, 0]
    torch.testing.assert_close(kl[3], (0.6351814 - x[3].double() / 2).to(dtype))
    assert slope[:4].tolist() == [-0.5, 0, 0, -0.5]
    assert curvature[:4].tolist() == [0, 0, 0, 0]
    assert kl[4].isnan()
    assert slope[4].isnan()
    assert curvature[4].isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision_is_computed_in_float32(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    x = grid(dtype)
    assert torch.equal(function(x), function(x.float()).to(dtype))


def test_gradient_reaches_every_weight() -> None:
    """No clamp: over log_alpha in [-80, 80] the slope is never 0 in float32."""
    x = torch.linspace(-80, 80, 1001, requires_grad=True)
    exact_kl(x).sum().backward()
    assert (x.grad < 0).all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives_pass_gradcheck(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-9, 9, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x, check_batched_grad=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_transforms_of_torch_func_agree_with_autograd(
    function: Callable[[Tensor], Tensor],
) -> None:
    x = torch.linspace(-4, 4, 6, dtype=torch.float64)
    assert torch.equal(vmap(function)(x.reshape(2, 3)), function(x).reshape(2, 3))
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(y).sum(), y, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), y)
    torch.testing.assert_close(vmap(grad(function))(x), slope)
    torch.testing.assert_close(vmap(grad(grad(function)))(x), curvature)
    hessian = jacrev(jacrev(lambda z: function(z).sum()))(x)
    torch.testing.assert_close(hessian, curvature.diag())


def test_value_and_gradient_are_traced_by_make_fx() -> None:
    def value_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
        kl = exact_kl(x)
        return kl, torch.autograd.grad(kl.sum(), x)[0]

    traced = make_fx(value_and_slope)(torch.zeros(5, requires_grad=True))
    x = torch.linspace(-3, 3, 5, requires_grad=True)
    for got, expected in zip(traced(x), value_and_slope(x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_shape_and_layout_do_not_matter(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    x = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(1))[..., 0]
    assert function(x).shape == x.shape
    torch.testing.assert_close(function(x), function(x.clone().contiguous()))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_integers_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TypeError, match=r"log_alpha must be a floating-point tensor.*int64"):
        function(torch.tensor([1, 2]))


def test_softplus_is_exact_above_twenty() -> None:
    x = torch.linspace(-60, 60, 241, dtype=torch.float64)
    with mp.workdps(40):
        expected = torch.tensor(
            [float(mp.log1p(mp.exp(v))) for v in x.tolist()], dtype=torch.float64
        )
    torch.testing.assert_close(softplus(x), expected, rtol=1e-15, atol=0)
