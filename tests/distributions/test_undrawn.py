from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

from bayes_svdo.distributions import (
    AdditiveNoiseNormal,
    LocalReparameterization,
    UndrawnSample,
    WeightReused,
)
from bayes_svdo.distributions import undrawn as undrawn_module
from bayes_svdo.distributions.pruned import Block, PrunedAdditiveNoiseNormal

GENERATOR = torch.Generator().manual_seed(20)
Operation = Callable[[Tensor], Tensor]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


X, X3, VECTOR = normal(5, 4), normal(2, 5, 4), normal(4)
BIAS = normal(3)
LEFT = normal(3, 5)
SEQUENCE, IMAGE, VOLUME = normal(2, 4, 7), normal(2, 4, 6, 5), normal(2, 4, 4, 3, 4)
WORDS = torch.tensor([[1, 0, 2], [5, 1, 3]])

# name: (operation as a function of the weight, shape of the weight)
OPERATIONS: dict[str, tuple[Operation, tuple[int, ...]]] = {
    "linear": (lambda w: F.linear(X, w), (3, 4)),
    "linear, bias": (lambda w: F.linear(X, w, BIAS), (3, 4)),
    "linear, keywords": (lambda w: F.linear(input=X3, weight=w, bias=BIAS), (3, 4)),
    "linear, one output without a dimension": (lambda w: F.linear(X, w), (4,)),
    "linear, one input": (lambda w: F.linear(VECTOR, w, BIAS), (3, 4)),
    "linear, transposed": (lambda w: F.linear(X, w.t()), (4, 3)),
    "bilinear": (lambda w: F.bilinear(X, X, w, BIAS), (3, 4, 4)),
    "bilinear, keywords": (lambda w: F.bilinear(input1=X, input2=X, weight=w), (3, 4, 4)),
    "conv1d": (lambda w: F.conv1d(SEQUENCE, w, BIAS), (3, 4, 3)),
    "conv1d, stride and padding": (
        lambda w: F.conv1d(SEQUENCE, w, stride=2, padding=2),
        (3, 4, 3),
    ),
    "conv1d, same": (lambda w: F.conv1d(SEQUENCE, w, padding="same"), (3, 4, 3)),
    "conv1d, one sequence": (lambda w: F.conv1d(SEQUENCE[0], w), (3, 4, 3)),
    "conv2d": (lambda w: F.conv2d(IMAGE, w, BIAS), (3, 4, 3, 2)),
    "conv2d, all arguments": (lambda w: F.conv2d(IMAGE, w, None, 2, 1, 2, 2), (6, 2, 2, 3)),
    "conv2d, same": (
        lambda w: F.conv2d(input=IMAGE, weight=w, bias=BIAS, padding="same", dilation=2),
        (3, 4, 3, 2),
    ),
    "conv2d, depthwise": (lambda w: F.conv2d(IMAGE, w, groups=4, padding="valid"), (8, 1, 3, 3)),
    "conv3d": (lambda w: F.conv3d(VOLUME, w, BIAS, stride=(1, 2, 1), padding=1), (3, 4, 2, 2, 2)),
    "conv3d, groups": (
        lambda w: F.conv3d(VOLUME, w, groups=2, dilation=(2, 1, 1)),
        (4, 2, 2, 2, 2),
    ),
    "conv_transpose1d": (
        lambda w: F.conv_transpose1d(SEQUENCE, w, BIAS, stride=2, output_padding=1),
        (4, 3, 3),
    ),
    "conv_transpose2d": (
        lambda w: F.conv_transpose2d(IMAGE, w, None, 2, 1, 1, 2, 1),
        (4, 3, 3, 2),
    ),
    "conv_transpose3d": (
        lambda w: F.conv_transpose3d(VOLUME, w, padding=1, dilation=2),
        (4, 2, 2, 2, 2),
    ),
    "embedding": (lambda w: F.embedding(WORDS, w), (6, 3)),
    "embedding, keywords": (lambda w: F.embedding(input=WORDS, weight=w), (6, 3)),
    "x @ w": (lambda w: X @ w, (4, 3)),
    "x3 @ w": (lambda w: X3 @ w, (4, 3)),
    "x @ w, a vector": (lambda w: X @ w, (4,)),
    "x @ w, both vectors": (lambda w: VECTOR @ w, (4,)),
    "x @ w, a stack of weights": (lambda w: X @ w, (2, 4, 3)),
    "x @ w.T": (lambda w: X @ w.T, (3, 4)),
    "x @ w.mT": (lambda w: X @ w.mT, (2, 3, 4)),
    "x @ w.t()": (lambda w: X @ w.t(), (3, 4)),
    "x @ w.transpose": (lambda w: X @ w.transpose(-1, -2), (3, 4)),
    "x @ torch.transpose(w)": (lambda w: X @ torch.transpose(w, 0, 1), (3, 4)),
    "x @ w.permute": (lambda w: X @ w.permute(1, 0), (3, 4)),
    "x @ movedim(w)": (lambda w: X @ torch.movedim(w, 0, 1), (3, 4)),
    "x @ w.T.T": (lambda w: X @ w.T.T, (4, 3)),
    "w @ x": (lambda w: w @ X, (3, 5)),
    "w.T @ x": (lambda w: w.T @ X, (5, 3)),
    "w @ x, a vector": (lambda w: w @ VECTOR, (3, 4)),
    "matmul": (lambda w: torch.matmul(X3, w), (4, 3)),
    "matmul, keywords": (lambda w: torch.matmul(input=X, other=w), (4, 3)),
    "matmul, weight first": (lambda w: torch.matmul(w, other=X), (3, 5)),
    "Tensor.matmul": (lambda w: X.matmul(w), (4, 3)),
    "Tensor.matmul of the weight": (lambda w: w.matmul(X), (3, 5)),
    "linalg.matmul": (lambda w: torch.linalg.matmul(X, w), (4, 3)),
    "mm": (lambda w: torch.mm(X, w), (4, 3)),
    "mm, keyword": (lambda w: torch.mm(X, mat2=w), (4, 3)),
    "Tensor.mm": (lambda w: X.mm(mat2=w), (4, 3)),
    "bmm": (lambda w: torch.bmm(X3, w), (2, 4, 3)),
    "Tensor.bmm of the weight": (lambda w: w.bmm(mat2=X3), (2, 3, 5)),
    "mv": (lambda w: torch.mv(X, w), (4,)),
    "Tensor.mv of the weight": (lambda w: w.mv(VECTOR), (3, 4)),
    "addmm": (lambda w: torch.addmm(BIAS, X, w), (4, 3)),
    "addmm, keywords": (lambda w: torch.addmm(input=BIAS, mat1=X, mat2=w), (4, 3)),
    "addmm, weight first": (lambda w: torch.addmm(X[0], w, X), (3, 5)),
    "Tensor.addmm": (lambda w: BIAS.addmm(X, mat2=w), (4, 3)),
    "addmv": (lambda w: torch.addmv(X[:, 0], X, w), (4,)),
    "baddbmm": (lambda w: torch.baddbmm(BIAS, X3, w), (2, 4, 3)),
    "baddbmm, keywords": (lambda w: torch.baddbmm(BIAS, batch1=X3, batch2=w), (2, 4, 3)),
}  # fmt: skip

each_operation = pytest.mark.parametrize("name", OPERATIONS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def parameters(
    *shape: int, log_sigma2: float = -1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """``loc`` and ``log_sigma2``, both leaves; log variances vary by one either way."""
    loc = torch.randn(shape, dtype=dtype)
    spread = torch.rand(shape, dtype=dtype) * 2 - 1
    return loc.requires_grad_(), (log_sigma2 + spread).requires_grad_()


def noise(value: float = 1.0) -> Any:
    """All noise is ``value``: outputs are mean + value * standard deviation."""
    return mock.patch.object(torch, "randn_like", lambda like: torch.full_like(like, value))


def fixed_noise() -> Any:
    """The same noise at every call, different for each element."""

    def randn_like(like: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    return mock.patch.object(torch, "randn_like", randn_like)


def exact_moments(op: Operation, loc: Tensor, log_sigma2: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of an output that is linear in ``w``: f(loc) and the sum of J² sigma²."""
    mean = op(loc)
    jacobian = torch.autograd.functional.jacobian(op, loc)
    variance = (jacobian.square() * log_sigma2.exp()).flatten(mean.dim()).sum(-1)
    return mean, variance


@each_operation
def test_output_has_the_exact_moments_of_weight_sampling(name: str) -> None:
    op, shape = OPERATIONS[name]
    loc, log_sigma2 = parameters(*shape)
    mean, variance = exact_moments(op, loc, log_sigma2)
    sample = UndrawnSample(loc, log_sigma2)
    with noise(0.0):
        torch.testing.assert_close(op(UndrawnSample(loc, log_sigma2)), mean)
    with noise(1.0):
        output = op(sample)
    assert type(output) is Tensor
    assert not sample.is_drawn
    torch.testing.assert_close(output - mean, variance.sqrt())


@each_operation
def test_output_has_the_moments_of_drawn_weights_by_monte_carlo(name: str) -> None:
    """6 standard errors per element: about 2,000 elements fail by chance once in 2e5 runs."""
    op, shape = OPERATIONS[name]
    draws = 400
    with torch.no_grad():
        loc, log_sigma2 = parameters(*shape)
        local = torch.stack([op(UndrawnSample(loc, log_sigma2)) for _ in range(draws)])
        sampled = torch.stack(
            [op(AdditiveNoiseNormal(loc, log_sigma2).sample()) for _ in range(draws)]
        )
    (mean, variance), (mean_s, variance_s) = (
        (value.mean(0), value.var(0)) for value in (local, sampled)
    )
    constant = variance_s < 1e-20  # the edge of a transposed convolution is bias alone
    error = (mean - mean_s).abs() - 6 * ((variance + variance_s) / draws).sqrt()
    assert (error < torch.where(constant, 1e-12, 0.0)).all()
    assert (variance[constant] < 10 * torch.finfo(loc.dtype).eps * variance.max()).all()
    # Both are Gaussian: the log of a sample variance has standard error sqrt(2 / (draws - 1)).
    ratio = (variance / variance_s)[~constant]
    assert (ratio.log().abs() < 6 * (4 / (draws - 1)) ** 0.5).all()


@pytest.mark.parametrize("name", ["linear", "conv2d", "embedding", "x3 @ w"])
def test_outputs_are_drawn_independently(name: str) -> None:
    """Correlation of neighbours; 6 standard errors: fails by chance once in 5e8 runs per case."""
    op, shape = OPERATIONS[name]
    with torch.no_grad():
        loc, log_sigma2 = parameters(*shape)
        outputs = torch.stack([op(UndrawnSample(loc, log_sigma2)) for _ in range(200)])
        deviation = ((outputs - op(loc)) / outputs.std(0)).flatten(1)
    products = deviation[:, 1:] * deviation[:, :-1]
    assert products.mean().abs() < 6 * products.numel() ** -0.5


@each_operation
def test_gradients_match_finite_differences_for_fixed_noise(name: str) -> None:
    op, shape = OPERATIONS[name]
    loc, log_sigma2 = parameters(*shape)
    with fixed_noise():
        torch.autograd.gradcheck(
            lambda loc, log_sigma2: op(UndrawnSample(loc, log_sigma2)),
            (loc, log_sigma2),
            fast_mode=True,  # a random projection
        )


def test_gradients_of_the_input_match_finite_differences_for_fixed_noise() -> None:
    loc, log_sigma2 = parameters(3, 4)
    kernel, log_kernel = parameters(3, 4, 2, 2)
    with fixed_noise():
        for x, function in (
            (X.clone(), lambda x: F.linear(x, UndrawnSample(loc, log_sigma2), BIAS)),
            (
                IMAGE[:1].clone(),
                lambda x: F.conv2d(x, UndrawnSample(kernel, log_kernel), padding=1),
            ),
        ):
            torch.autograd.gradcheck(function, (x.requires_grad_(),))


def test_second_derivatives_match_finite_differences() -> None:
    loc, log_sigma2 = parameters(2, 4)
    with fixed_noise():
        torch.autograd.gradgradcheck(
            lambda loc, log_sigma2: F.linear(X, UndrawnSample(loc, log_sigma2)), (loc, log_sigma2)
        )


def test_a_bayesian_bias_adds_its_variance() -> None:
    weight, bias = parameters(3, 4), parameters(3)
    sigma2_x = X.square() @ weight[1].exp().T + bias[1].exp()
    for op in (
        lambda w, b: F.linear(X, w, b),
        lambda w, b: torch.addmm(b, X, w.T),
        lambda w, b: torch.addmm(input=b, mat1=X, mat2=w.t()),
    ):
        samples = UndrawnSample(*weight), UndrawnSample(*bias)
        with noise(1.0):
            output = op(*samples)
        torch.testing.assert_close(output, F.linear(X, weight[0], bias[0]) + sigma2_x.sqrt())
        assert not any(sample.is_drawn for sample in samples)


def test_a_bayesian_bias_of_a_convolution_adds_its_variance() -> None:
    weight, bias = parameters(3, 4, 2, 2), parameters(3)
    with noise(1.0):
        output = F.conv2d(IMAGE, UndrawnSample(*weight), UndrawnSample(*bias), padding=1)
    mean = F.conv2d(IMAGE, weight[0], bias[0], padding=1)
    variance = F.conv2d(IMAGE.square(), weight[1].exp(), bias[1].exp(), padding=1)
    torch.testing.assert_close(output, mean + variance.sqrt())


def test_a_bayesian_bias_of_a_deterministic_weight_is_drawn_once() -> None:
    bias = UndrawnSample(*parameters(3))
    output = F.linear(X, normal(3, 4), bias) - F.linear(X, torch.zeros(3, 4).double())
    assert bias.is_drawn
    assert output.shape == (5, 3)
    other = torch.addmm(bias, X, torch.zeros(4, 3).double())
    assert torch.equal(other, bias.draw().expand(5, 3))


@pytest.mark.parametrize("log_sigma2", [-300.0, -80.0, 60.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "use",
    [
        lambda w: F.linear(X.to(w.dtype), w),
        lambda w: F.linear(X.to(w.dtype), w * 1.0),
        lambda w: X.to(w.dtype) @ w.T,
    ],
    ids=["linear", "drawn", "matmul"],
)
def test_tiny_and_huge_variances_give_finite_values_and_gradients(
    use: Operation, dtype: torch.dtype, log_sigma2: float
) -> None:
    check_finite(use, (3, 4), dtype, log_sigma2)


@pytest.mark.parametrize("log_sigma2", [-300.0, -80.0, 60.0, 200.0])
@pytest.mark.parametrize("name", ["conv2d", "conv_transpose1d", "embedding"])
def test_tiny_and_huge_variances_of_other_operations_are_finite(
    name: str, log_sigma2: float
) -> None:
    op, shape = OPERATIONS[name]
    check_finite(op, shape, torch.float64, log_sigma2)


def check_finite(
    use: Operation, shape: tuple[int, ...], dtype: torch.dtype, log_sigma2: float
) -> None:
    loc = torch.randn(shape, dtype=dtype, requires_grad=True)
    log = torch.full(shape, log_sigma2, dtype=dtype, requires_grad=True)
    output = use(UndrawnSample(loc, log))
    output.sum().backward()
    assert output.isfinite().all()
    assert loc.grad is not None
    assert log.grad is not None
    assert loc.grad.isfinite().all()
    assert log.grad.isfinite().all()
    if log_sigma2 > 0:  # the bound on the variance does not stop its gradient
        used = loc.grad != 0
        assert torch.equal(log.grad != 0, used)
        assert used.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_zero_input_gives_its_bias_and_finite_gradients(dtype: torch.dtype) -> None:
    """A dead ReLU layer or a blank image: the root's slope at a variance of zero is infinite."""
    x = torch.randn(5, 4, dtype=dtype)
    x[2] = 0.0
    x.requires_grad_()
    image = torch.zeros(2, 1, 6, 6, dtype=dtype)
    image[1, 0, 4:, 4:] = 1.0
    for bias in (None, torch.randn(3, dtype=dtype)):
        loc, log_sigma2 = parameters(3, 4, dtype=dtype)
        output = F.linear(x, UndrawnSample(loc, log_sigma2), bias)
        expected = torch.zeros(3, dtype=dtype) if bias is None else bias
        torch.testing.assert_close(output[2], expected)
        kernel, log_kernel = parameters(3, 1, 3, 3, dtype=dtype)
        features = F.conv2d(image, UndrawnSample(kernel, log_kernel), bias)
        blank = expected[:, None].expand(3, 4)
        # Up to the floor of a convolution's variance, one rounding error at six sigma.
        atol = 6 * torch.finfo(dtype).eps
        torch.testing.assert_close(features[0, :, 0], blank, rtol=1e-6, atol=atol)
        (output.square().sum() + features.square().sum()).backward()
        for leaf in (x, loc, log_sigma2, kernel, log_kernel):
            assert leaf.grad is not None
            assert leaf.grad.isfinite().all()
            assert (leaf.grad != 0).any()


def test_the_whole_batch_may_be_zero() -> None:
    loc, log_sigma2 = parameters(3, 4, dtype=torch.float32)
    output = F.linear(torch.zeros(5, 4), UndrawnSample(loc, log_sigma2))
    output.sum().backward()
    assert output.abs().max() < 1e-12
    assert log_sigma2.grad is not None
    assert torch.equal(log_sigma2.grad, torch.zeros(3, 4))


def fft_conv2d(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """A fast convolution, with the rounding errors of one."""
    size = x.shape[-2:]
    spectrum = torch.einsum("nihw,oihw->nohw", torch.fft.rfft2(x), torch.fft.rfft2(w, size).conj())
    output = torch.fft.irfft2(spectrum, size)
    output = output[..., : size[0] - w.shape[-2] + 1, : size[1] - w.shape[-1] + 1]
    return output if bias is None else output + bias[:, None, None]


@pytest.mark.parametrize("log_sigma2", [-25.0, -10.0, -4.0, 0.0])
def test_rounding_errors_of_a_fast_convolution_do_not_swamp_its_gradient(
    log_sigma2: float,
) -> None:
    """float32 with an FFT against float64 without, same noise, an image that is mostly blank.

    The variance comes out negative for a third of the pixels; with nothing but a tiny number added
    to it the gradient would be wrong by a factor of 1e4 and more.
    """
    generator = torch.Generator().manual_seed(1)
    image = torch.zeros(1, 3, 32, 32)
    image[..., 12:18, 12:18] = torch.rand(1, 3, 6, 6, generator=generator)
    kernel = torch.randn(4, 3, 3, 3, generator=generator)
    log_kernel = torch.full((4, 3, 3, 3), log_sigma2)
    rough = fft_conv2d(image.square(), log_kernel.exp())
    assert (rough < 0).float().mean() > 0.2
    values = torch.randn(1, 4, 30, 30, generator=generator)
    found = []
    for dtype, convolve in ((torch.float32, fft_conv2d), (torch.float64, F.conv2d)):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (kernel, log_kernel)]
        with mock.patch.object(torch, "randn_like", return_value=values.to(dtype)):
            convolution = undrawn_module._convolution(convolve, spatial_dims=2)
            output = convolution(image.to(dtype), UndrawnSample(*leaves))
        output.sum().backward()
        found.append((output.detach(), *(leaf.grad for leaf in leaves)))
    for single, double in zip(*found, strict=True):
        assert single is not None
        assert double is not None
        assert single.isfinite().all()
        assert (single - double).norm() < 2e-3 * double.norm()


def test_a_variance_that_is_negative_throughout_counts_as_zero() -> None:
    mean = torch.zeros(1, 1, 3, 3, requires_grad=True)
    variance = torch.full((1, 1, 3, 3), -1e-8, requires_grad=True)
    output = undrawn_module._normal(mean, variance, 2)
    output.sum().backward()
    assert output.abs().max() < 1e-12
    assert variance.grad is not None
    assert torch.equal(variance.grad, torch.zeros_like(variance))


def test_a_dead_channel_or_a_blank_image_gets_no_noise_from_its_neighbours() -> None:
    """Batch normalisation would blow it up."""
    loc = torch.zeros(2, 4, 3, 3)
    log_sigma2 = torch.tensor([-60.0, 2.0])[:, None, None, None].expand(2, 4, 3, 3)
    image = torch.randn(2, 4, 6, 6)
    image[1] = 0.0
    output = F.conv2d(image, UndrawnSample(loc, log_sigma2))
    assert output[:, 0].abs().max() < 1e-11
    assert output[1].abs().max() < 1e-12
    assert output[0, 1].std() > 1


def test_small_noise_is_not_lost_in_the_floor() -> None:
    """float64 has room for a standard deviation of e^-15, also in a convolution."""
    loc = torch.zeros(3, 4, 1, dtype=torch.float64)
    sample = UndrawnSample(loc, torch.tensor(-30.0).double())
    with noise(1.0):
        output = F.conv1d(SEQUENCE, sample)
    expected = (SEQUENCE.square().sum(1) * math.exp(-30.0)).sqrt()
    torch.testing.assert_close(output[:, 0], expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_have_their_variance_computed_in_float32(
    dtype: torch.dtype,
) -> None:
    """exp(-20) is zero in float16, and 300² overflows it."""
    loc = torch.zeros(3, 4, dtype=dtype, requires_grad=True)
    log_sigma2 = torch.full((3, 4), -20.0, dtype=dtype, requires_grad=True)
    x = torch.full((2, 4), 300.0, dtype=dtype)
    with noise(1.0):
        output = F.linear(x, UndrawnSample(loc, log_sigma2))
        drawn = UndrawnSample(loc, log_sigma2).draw()
    assert output.dtype == drawn.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert output.flatten().tolist() == pytest.approx([600 * math.exp(-10)] * 6, rel=eps)
    assert drawn.flatten().tolist() == pytest.approx([math.exp(-10)] * 12, rel=eps)
    output.sum().backward()
    assert log_sigma2.grad is not None
    assert (log_sigma2.grad > 0).all()


def test_autocast_leaves_the_variance_in_float32() -> None:
    loc = torch.zeros(3, 4, requires_grad=True)
    log_sigma2 = torch.full((3, 4), -8.0, requires_grad=True)
    x = torch.full((2, 4), 1.0 + 2**-7)  # its square is not a bfloat16
    seen = []
    real = undrawn_module._normal

    def spy(mean: Tensor, variance: Tensor, spatial_dims: int = 0) -> Tensor:
        seen.append(variance)
        return real(mean, variance, spatial_dims)

    with (
        mock.patch.object(undrawn_module, "_normal", spy),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        outputs = [
            F.linear(x, UndrawnSample(loc, log_sigma2)),
            x @ UndrawnSample(loc, log_sigma2).T,
            torch.addmm(torch.zeros(3), x, UndrawnSample(loc, log_sigma2).T),
            F.conv1d(x[..., None], UndrawnSample(loc[..., None], log_sigma2[..., None])).squeeze(
                -1
            ),
        ]
        assert torch.is_autocast_enabled("cpu")
    for output, variance in zip(outputs, seen, strict=True):
        assert output.dtype == torch.bfloat16
        assert variance.dtype == torch.float32
        exact = (x.double().square() @ log_sigma2.double().exp().T).squeeze()
        torch.testing.assert_close(variance.squeeze().double(), exact, rtol=1e-6, atol=0)
    torch.stack([output.float() for output in outputs]).square().sum().backward()
    assert log_sigma2.grad is not None
    assert log_sigma2.grad.isfinite().all()


def test_the_embedding_of_the_padding_word_gets_no_gradient() -> None:
    loc, log_sigma2 = parameters(6, 3)
    sample = UndrawnSample(loc, log_sigma2)
    F.embedding(WORDS, sample, padding_idx=0).square().sum().backward()
    for leaf in (loc, log_sigma2):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad[0], torch.zeros(3).double())
        assert (leaf.grad[1] != 0).all()
    assert not sample.is_drawn


def test_a_sparse_embedding_gives_sparse_gradients() -> None:
    loc, log_sigma2 = parameters(6, 3)
    dense = parameters(6, 3)
    for leaf, like in zip(dense, (loc, log_sigma2), strict=True):
        leaf.data.copy_(like)
    with fixed_noise():
        F.embedding(WORDS, UndrawnSample(loc, log_sigma2), sparse=True).square().sum().backward()
        F.embedding(WORDS, UndrawnSample(*dense)).square().sum().backward()
    assert loc.grad is not None
    assert loc.grad.is_sparse
    for leaf, like in zip((loc, log_sigma2), dense, strict=True):
        assert leaf.grad is not None
        assert like.grad is not None
        torch.testing.assert_close(leaf.grad.to_dense(), like.grad)


def test_an_embedding_with_max_norm_is_drawn_because_it_normalises() -> None:
    sample = UndrawnSample(*parameters(6, 3))
    output = F.embedding(WORDS, sample, max_norm=0.5)
    assert sample.is_drawn
    assert (output.norm(dim=-1) <= 0.5 + 1e-6).all()
    assert torch.equal(output, F.embedding(WORDS, sample.draw()))


class _Square(nn.Module):
    """Uses its weight in a way of its own."""

    def forward(self, w: Tensor) -> Tensor:
        return X * w.square().sum()


OTHER_USES: dict[str, tuple[Callable[[Any], Any], tuple[int, ...]]] = {
    "arithmetic": (lambda w: X @ (2 * w + 1), (4, 3)),
    "relu": (lambda w: X @ F.relu(w), (4, 3)),
    "normalised": (lambda w: F.linear(X, F.normalize(w)), (3, 4)),
    "indexed": (lambda w: X @ w[:, :2], (4, 3)),
    "reshaped": (lambda w: X @ w.view(4, 3), (12,)),
    "converted": (lambda w: X.float() @ w.float(), (4, 3)),
    "einsum": (lambda w: torch.einsum("ni,oi->no", X, w), (3, 4)),
    "tensordot": (lambda w: torch.tensordot(X, w, dims=([1], [0])), (4, 3)),
    "addmm with beta": (lambda w: torch.addmm(BIAS, X, w, beta=0.5), (4, 3)),
    "in a list": (lambda w: torch.cat([w, w]), (4, 3)),
    "in a nested list": (lambda w: torch.block_diag(*[w, w]), (4, 3)),
    "as a keyword": (lambda w: torch.sum(input=w), (4, 3)),
    "transposed by keywords": (lambda w: torch.transpose(input=w, dim0=0, dim1=1) * 1, (4, 3)),
    "module of the user": (lambda w: _Square()(w), (4, 3)),
    "low-level product": (lambda w: torch.ops.aten.mm(X, w), (4, 3)),
    "lstm cell": (
        lambda w: torch.lstm_cell(X, [X, X], w, torch.ones(16, 4).double()),
        (16, 4),
    ),
    "gru": (
        lambda w: torch.gru(
            X3, torch.zeros(1, 2, 4).double(), [w, w], False, 1, 0.0, False, False, True
        )[0],
        (12, 4),
    ),
    "in place": (lambda w: w.mul_(2), (4, 3)),
    "embedding bag": (lambda w: F.embedding_bag(WORDS, w), (6, 3)),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_USES)
def test_any_other_use_draws_the_weight_once(name: str) -> None:
    use, shape = OTHER_USES[name]
    loc, log_sigma2 = parameters(*shape)
    sample = UndrawnSample(loc, log_sigma2)
    output = use(sample)
    assert sample.is_drawn
    copied = sample.draw().detach().clone()
    if name == "in place":
        assert torch.equal(output, sample.draw())
    else:
        again = use(copied)
        for first, second in zip(
            *(value if isinstance(value, tuple) else (value,) for value in (output, again)),
            strict=True,
        ):
            torch.testing.assert_close(first, second)
    first = output[0] if isinstance(output, tuple) else output
    first.sum().backward()
    for leaf in (loc, log_sigma2):
        assert leaf.grad is not None
        assert (leaf.grad != 0).any()


def test_a_draw_is_seen_by_all_later_uses() -> None:
    sample = UndrawnSample(*parameters(3, 4))
    total = sample.sum()
    value = sample.draw()
    assert type(value) is Tensor
    assert torch.equal(total, value.sum())
    assert torch.equal(F.linear(X, sample), F.linear(X, value))
    assert torch.equal(X @ sample.T, X @ value.T)
    assert torch.equal(sample.mT, value.mT)
    assert sample.draw() is value


def test_the_draw_of_a_transpose_is_the_transposed_draw() -> None:
    sample = UndrawnSample(*parameters(3, 4))
    transposed = sample.T
    assert transposed.shape == (4, 3)
    assert isinstance(transposed, UndrawnSample)
    assert torch.equal(transposed.draw(), sample.draw().T)
    assert transposed.is_drawn
    assert not transposed.is_contiguous()


def test_draws_have_the_moments_of_the_posterior() -> None:
    """5 standard errors: fails by chance once in 1e6 runs."""
    with torch.no_grad():
        loc = torch.tensor(1.5).double().expand(40_000)
        draw = UndrawnSample(loc, torch.tensor(-2.0).double()).draw()
    sigma = math.exp(-1.0)
    assert abs(float(draw.mean()) - 1.5) < 5 * sigma / 200
    assert abs(float(draw.var()) / sigma**2 - 1) < 5 * (2 / 40_000) ** 0.5


def test_two_samples_are_independent() -> None:
    loc, log_sigma2 = parameters(3, 4)
    first, second = (UndrawnSample(loc, log_sigma2) for _ in range(2))
    assert not torch.equal(first.draw(), second.draw())
    assert not torch.equal(
        F.linear(X, UndrawnSample(loc, log_sigma2)), F.linear(X, UndrawnSample(loc, log_sigma2))
    )


def test_a_product_of_weights_is_that_of_their_draws() -> None:
    """``x @ (u @ v)``: entries of ``u @ v`` share rows of u and columns of v."""
    u, v = UndrawnSample(*parameters(4, 2)), UndrawnSample(*parameters(2, 3))
    torch.testing.assert_close(X @ (u @ v), X @ (u.draw() @ v.draw()))
    mixing = nn.Parameter(normal(4, 4))
    for op in (lambda w: mixing @ w, lambda w: F.linear(mixing, w.T)):
        w = UndrawnSample(*parameters(4, 3))
        torch.testing.assert_close(op(w), op(w.draw()))
    w = UndrawnSample(*parameters(4, 4))
    torch.testing.assert_close(w.T @ w, w.draw().T @ w.draw())


@pytest.mark.parametrize(
    "second",
    [lambda w: F.linear(X, w), lambda w: w.sum(), lambda w: X @ w.T, lambda w: w.draw()],
    ids=["linear", "raw", "transpose", "draw"],
)
def test_a_second_use_after_a_linear_one_is_refused_by_name(second: Operation) -> None:
    sample = UndrawnSample(*parameters(3, 4), name="decoder.weight")
    F.linear(X, sample)
    with pytest.raises(WeightReused, match=r'"decoder\.weight" is used more than once') as caught:
        second(sample)
    assert caught.value.name == "decoder.weight"
    assert 'LocalReparameterization(drawn={"decoder.weight"})' in str(caught.value)
    assert 'reuse="independent"' in str(caught.value)


def test_uses_through_transposes_count_as_uses_of_one_weight() -> None:
    sample = UndrawnSample(*parameters(4, 4))
    transposed = sample.T
    F.linear(X, sample)
    with pytest.raises(WeightReused):
        X @ transposed


def test_weight_and_bias_may_not_be_the_same_undrawn_sample_twice() -> None:
    bias = UndrawnSample(*parameters(3), name="b")
    F.linear(X, UndrawnSample(*parameters(3, 4)), bias)
    with pytest.raises(WeightReused, match='"b"'):
        F.linear(X, UndrawnSample(*parameters(3, 4)), bias)


def test_independent_reuse_gives_each_use_noise_of_its_own() -> None:
    loc, log_sigma2 = parameters(3, 4)
    sample = UndrawnSample(loc, log_sigma2, reuse="independent")
    first, second = F.linear(X, sample), F.linear(X, sample)
    assert not torch.equal(first, second)
    with noise(1.0):
        std = (X.square() @ log_sigma2.exp().T).sqrt()
        torch.testing.assert_close(F.linear(X, sample), F.linear(X, loc) + std)
    draw = sample + 0  # and a raw use draws once, for what follows
    assert torch.equal(draw, sample.draw())


def test_an_unknown_reuse_is_refused() -> None:
    with pytest.raises(ValueError, match='reuse must be "draw" or "independent", but is \'indep\''):
        UndrawnSample(*parameters(3, 4), reuse="indep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reuse must be"):
        LocalReparameterization(reuse="no")  # type: ignore[arg-type]


class _Round(torch.autograd.Function):
    """Rounding with a straight-through gradient, as quantised layers have it."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_a_use_that_would_lose_the_gradient_is_refused() -> None:
    """Never a wrong gradient: a custom Function sees no function of ``loc``."""
    sample = UndrawnSample(*parameters(3, 4), name="w")
    with pytest.raises(WeightReused, match=r"custom autograd\.Function") as caught:
        _Round.apply(sample)
    assert caught.value.name == "w"
    with torch.no_grad(), pytest.raises(WeightReused):
        F.linear(X, sample)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(WeightReused):
        torch.ops.aten.t(sample)
    assert not sample.is_drawn
    sample.sum()  # drawn
    with pytest.raises(WeightReused):
        _Round.apply(sample)


def test_without_gradients_nothing_is_refused() -> None:
    with torch.no_grad():
        sample = UndrawnSample(*parameters(3, 4))
        output = F.linear(X, sample)
        assert not sample.is_drawn
        assert not output.requires_grad
        rounded = _Round.apply(UndrawnSample(*parameters(3, 4)))
        assert torch.equal(rounded, rounded.round())
        other = UndrawnSample(*parameters(3, 4))
        with torch._C.DisableTorchFunctionSubclass():
            product = torch.ops.aten.mul(other, 2.0)
        assert torch.equal(product, 2 * other.draw())
    with torch.inference_mode():
        assert F.linear(X, UndrawnSample(*parameters(3, 4))).shape == (5, 3)


METADATA: dict[str, Callable[[Any], Any]] = {
    "shape": lambda w: w.shape,
    "size": lambda w: (w.size(), w.size(0), w.size(dim=-1)),
    "dtype": lambda w: (w.dtype, w.is_floating_point(), torch.is_floating_point(w)),
    "complex": lambda w: (w.is_complex(), torch.is_complex(w), w.is_signed()),
    "device": lambda w: (w.device, w.is_cuda, w.is_cpu, w.get_device()),
    "dimensions": lambda w: (w.ndim, w.dim(), w.ndimension(), len(w)),
    "numel": lambda w: (w.numel(), w.nelement(), torch.numel(w), w.element_size(), w.nbytes),
    "layout": lambda w: (w.layout, w.is_sparse, w.is_quantized, w.is_nested, w.is_meta),
    "memory": lambda w: (w.stride(), w.is_contiguous(), w.storage_offset()),
    "isinstance": lambda w: (isinstance(w, Tensor), torch.is_tensor(w)),
}  # fmt: skip


@pytest.mark.parametrize("name", METADATA)
def test_metadata_are_those_of_a_draw_and_draw_nothing(name: str) -> None:
    sample = UndrawnSample(*parameters(3, 4, dtype=torch.float32))
    found = METADATA[name](sample)
    assert not sample.is_drawn
    assert not sample._draw.used
    assert found == METADATA[name](sample.draw())


def test_printing_and_looking_draw_nothing() -> None:
    sample = UndrawnSample(*parameters(3, 4), name="fc1.weight")
    text = 'UndrawnSample(site="fc1.weight", shape=(3, 4), not drawn yet)'
    assert repr(sample) == str(sample) == f"{sample}" == f"{sample!r}" == text
    assert f"{sample:>70}" == text.rjust(70)
    assert "draw" in dir(sample)
    assert hash(sample) == hash(sample)
    assert {sample: 1}[sample] == 1
    assert not sample.requires_grad
    assert not sample.is_drawn
    sample.draw()
    assert str(sample) == text.replace("not drawn yet", "drawn")


def test_copies_are_plain_tensors_with_the_value_of_the_draw() -> None:
    def saved(sample: Tensor) -> Tensor:
        buffer = io.BytesIO()
        torch.save(sample, buffer)
        buffer.seek(0)
        loaded: Tensor = torch.load(buffer)
        return loaded

    for duplicate in (
        copy.copy,
        copy.deepcopy,
        saved,
        lambda sample: pickle.loads(pickle.dumps(sample)),
        lambda sample: copy.deepcopy([sample, sample])[1],
        lambda sample: sample.clone(),
        lambda sample: sample.detach(),
    ):
        sample = UndrawnSample(*parameters(3, 4))
        duplicate_ = duplicate(sample)
        assert type(duplicate_) is Tensor
        assert torch.equal(duplicate_, sample.draw())


def test_an_expanded_posterior_has_independent_draws() -> None:
    """As in vectorised particles: ``loc`` is a view with strides of zero."""
    loc, log_sigma2 = parameters(3, 4)
    q = AdditiveNoiseNormal(loc, log_sigma2).expand((2, 1, 3, 4))
    draw = UndrawnSample.of(q).draw()
    assert draw.shape == (2, 1, 3, 4)
    assert not torch.equal(draw[0], draw[1])
    draw.sum().backward()
    assert loc.grad is not None
    torch.testing.assert_close(loc.grad, torch.full_like(loc, 2.0))
    with noise(1.0):
        output = X @ UndrawnSample.of(q).mT
    assert output.shape == (2, 1, 5, 3)


def test_a_pruned_block_gives_the_moments_of_the_whole_matrix() -> None:
    loc, log_sigma2 = parameters(3, 4)
    keep = torch.zeros(3, 4, dtype=torch.bool)
    keep[0, 1] = keep[2, 1] = keep[2, 3] = True
    weight = loc.where(keep, 0.0)
    variance = log_sigma2.exp().where(keep, 0.0)
    for bias in (None, BIAS):
        sample = UndrawnSample.of(PrunedAdditiveNoiseNormal(loc, log_sigma2, keep, Block.of(keep)))
        with noise(1.0):
            output = F.linear(X3, sample, bias)
        std = (X3.square() @ variance.T).sqrt()
        torch.testing.assert_close(output, F.linear(X3, weight, bias) + std)
        assert not sample.is_drawn
        with pytest.raises(WeightReused):
            F.linear(X3, sample, bias)


def guide(log_sigma2: float = -2.0) -> Tensor:
    loc = pyro.param("loc", lambda: torch.arange(12.0).reshape(3, 4))
    q = AdditiveNoiseNormal(loc, torch.full((3, 4), log_sigma2)).to_event(2)
    value: Tensor = pyro.sample("w", q)
    return value


def model(x: Tensor) -> Tensor:
    w = pyro.sample("w", dist.Normal(0.0, 1.0).expand((3, 4)).to_event(2))
    return F.linear(x, w)


class TestLocalReparameterization:
    def test_a_gaussian_site_is_left_undrawn(self) -> None:
        with LocalReparameterization():
            value = guide()
        assert isinstance(value, UndrawnSample)
        assert not value.is_drawn
        assert value._draw.name == "w"
        assert not isinstance(guide(), UndrawnSample)

    def test_it_wraps_a_function(self) -> None:
        assert isinstance(LocalReparameterization()(guide)(), UndrawnSample)

    def test_other_posteriors_and_named_sites_are_drawn(self) -> None:
        with LocalReparameterization(drawn={"w"}):
            assert not isinstance(guide(), UndrawnSample)
        with LocalReparameterization(drawn="ww"):  # a name, not a set of letters
            assert isinstance(guide(), UndrawnSample)
        with LocalReparameterization():
            value = pyro.sample("other", dist.Normal(0.0, 1.0))
        assert not isinstance(value, UndrawnSample)

    def test_reuse_is_passed_on(self) -> None:
        with LocalReparameterization(reuse="independent"):
            value = guide()
        x = torch.ones(2, 4)
        assert not torch.equal(F.linear(x, value), F.linear(x, value))

    def test_trace_and_replay_hand_it_to_the_model(self) -> None:
        guide_trace = poutine.trace(LocalReparameterization()(guide)).get_trace()
        value = guide_trace.nodes["w"]["value"]
        assert isinstance(value, UndrawnSample)
        x = torch.ones(2, 4)
        trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(x)
        assert trace.nodes["w"]["value"] is value
        assert not value.is_drawn
        output = trace.nodes["_RETURN"]["value"]
        output.sum().backward()
        gradient = pyro.param("loc").grad
        assert gradient is not None
        assert torch.equal(gradient, torch.full((3, 4), 2.0))

    @pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
    @pytest.mark.parametrize(
        "give",
        [
            lambda f: poutine.condition(f, {"w": torch.ones(3, 4)}),
            lambda f: poutine.replay(f, trace=_replayable()),
        ],
        ids=["condition", "replay"],
    )
    def test_a_given_value_is_used_as_it_is(self, give: Any, outside: bool) -> None:
        wrapped = (
            give(LocalReparameterization()(guide))
            if outside
            else LocalReparameterization()(give(guide))
        )
        value = wrapped()
        assert not isinstance(value, UndrawnSample)
        assert torch.equal(value, torch.ones(3, 4))

    def test_block_scale_and_mask_let_it_through(self) -> None:
        for wrap in (
            lambda f: poutine.block(f, hide=["other"]),
            lambda f: poutine.scale(f, scale=0.5),
            lambda f: poutine.mask(f, mask=torch.tensor(True)),
        ):
            for wrapped in (
                LocalReparameterization()(wrap(guide)),
                wrap(LocalReparameterization()(guide)),
            ):
                trace = poutine.trace(wrapped).get_trace()
                assert isinstance(trace.nodes["w"]["value"], UndrawnSample)
        trace = poutine.trace(
            poutine.scale(LocalReparameterization()(guide), scale=0.5)
        ).get_trace()
        assert trace.nodes["w"]["scale"] == 0.5

    def test_a_blocked_site_is_not_reached(self) -> None:
        with LocalReparameterization(), poutine.block():
            assert not isinstance(guide(), UndrawnSample)

    def test_no_grad(self) -> None:
        with torch.no_grad(), LocalReparameterization():
            output = F.linear(torch.ones(2, 4), guide())
        assert not output.requires_grad

    def test_sites_in_plates_have_the_shape_of_the_site(self) -> None:
        def in_plates() -> Tensor:
            with pyro.plate("out", 3, dim=-2), pyro.plate("in", 4, dim=-1):
                value: Tensor = pyro.sample("w", AdditiveNoiseNormal(torch.zeros(4), -1.0))
            return value

        value = LocalReparameterization()(in_plates)()
        assert isinstance(value, UndrawnSample)
        assert value.shape == (3, 4)

    def test_a_plate_around_it_is_refused_with_advice(self) -> None:
        wrapped = LocalReparameterization()(guide)
        with (
            pyro.plate("particles", 5, dim=-1),
            pytest.raises(ValueError, match=r'site "w".*\(3, 4\).*\(5, 3, 4\).*plate.*\n.*inside'),
        ):
            wrapped()

    def test_its_log_prob_is_that_of_the_draw(self) -> None:
        trace = poutine.trace(LocalReparameterization()(guide)).get_trace()
        trace.compute_log_prob()
        site = trace.nodes["w"]
        assert torch.equal(site["log_prob"], site["fn"].log_prob(site["value"].draw()))

    def test_the_error_comes_through_a_trace_as_it_is(self) -> None:
        """Pyro makes RuntimeErrors and ValueErrors anew from their text: the name would be lost."""

        def twice() -> Tensor:
            w = guide()
            return F.linear(torch.ones(2, 4), w) + F.linear(torch.zeros(2, 4), w)

        with pytest.raises(WeightReused) as caught:
            poutine.trace(LocalReparameterization()(twice)).get_trace()
        assert caught.value.name == "w"


def _replayable() -> poutine.Trace:
    def ones() -> None:
        pyro.sample("w", dist.Delta(torch.ones(3, 4)).to_event(2))

    return poutine.trace(ones).get_trace()


@pytest.mark.cuda
def test_operations_run_on_cuda_with_the_moments_of_the_cpu() -> None:
    x, image = X.float().cuda(), IMAGE.float().cuda()
    for op, shape in (
        (lambda x, w: F.linear(x[0], w), (3, 4)),
        (lambda x, w: F.conv2d(x[1], w, padding=1), (3, 4, 3, 3)),
        (lambda x, w: x[0] @ w.T, (3, 4)),
    ):
        loc, log_sigma2 = parameters(*shape, dtype=torch.float32)
        with noise(1.0):
            expected = op((x.cpu(), image.cpu()), UndrawnSample(loc, log_sigma2))
            output = op((x, image), UndrawnSample(loc.cuda(), log_sigma2.cuda()))
        assert output.is_cuda
        # TF32 convolutions have ten bits.
        torch.testing.assert_close(output.cpu(), expected, rtol=5e-3, atol=5e-3)
        with torch.autocast("cuda", dtype=torch.float16):
            half = op((x, image), UndrawnSample(loc.cuda(), log_sigma2.cuda()))
        assert half.dtype == torch.float16
        assert half.isfinite().all()


def test_a_weight_can_be_drawn_again_until_it_is_drawn():
    weight = UndrawnSample(torch.zeros(3, 4), torch.zeros(3, 4))
    other = undrawn_module.again(weight)
    assert not torch.equal(F.linear(torch.ones(1, 4), weight), F.linear(torch.ones(1, 4), other))
    drawn = UndrawnSample(torch.zeros(3, 4), torch.zeros(3, 4))
    drawn.draw()
    for value in (drawn, UndrawnSample(torch.zeros(3, 4), torch.zeros(3, 4)).t(), torch.zeros(3)):
        with pytest.raises(ValueError, match="not been drawn yet can be drawn again"):
            undrawn_module.again(value)
