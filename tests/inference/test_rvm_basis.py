"""Basis functions: their values, and products with all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import pairwise
from torch import Tensor

from bayes_svdo.inference import rvm_basis
from bayes_svdo.inference.rvm_basis import DesignMatrix, check_inputs, resolve_kernel

KEPT, COMPUTED_AGAIN = 2**30, 0


def inputs(n: int = 40, d: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def design(x: Tensor, kernel="rbf", *, centred=True, max_bytes=KEPT, gamma=0.3) -> DesignMatrix:
    basis = resolve_kernel(x, kernel, gamma, 3, 1.0)
    return DesignMatrix(basis, x, centred=centred, max_bytes=max_bytes)


def l1_kernel(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, p=1).neg().exp()


@pytest.mark.parametrize(
    ("kernel", "reference"),
    [
        ("rbf", lambda a, b: pairwise.rbf_kernel(a, b, gamma=0.7)),
        ("poly", lambda a, b: pairwise.polynomial_kernel(a, b, degree=3, gamma=0.7, coef0=1.0)),
        (l1_kernel, lambda a, b: pairwise.laplacian_kernel(a, b, gamma=1.0)),
    ],
    ids=["rbf", "poly", "callable"],
)
def test_kernels_are_those_of_scikit_learn(kernel, reference):
    x, new = inputs(), inputs(7, seed=1)
    chosen = resolve_kernel(x, kernel, 0.7, 3, 1.0).at(x, torch.tensor([4, 1, 30]))
    expected = reference(new.numpy(), x[[4, 1, 30]].numpy())
    np.testing.assert_allclose(chosen(new).numpy(), expected, rtol=1e-12)


def test_features_are_the_basis_functions_of_the_linear_kernel():
    x, new = inputs(), inputs(7, seed=1)
    chosen = resolve_kernel(x, "linear", "scale", 3, 1.0).at(x, torch.tensor([2, 0]))
    assert torch.equal(chosen(new), new[:, [2, 0]])


def test_rbf_kernel_survives_a_large_common_offset():
    """|x|^2 is 1e12 here: taken about 0 the exponent would have an error of 1e-4."""
    x = inputs()
    near, far = design(x), design(x + 1e6)
    v = torch.ones(len(x), 1, dtype=torch.float64)
    # x + 1e6 is itself rounded to 1e-10, which moves the kernel by about as much.
    torch.testing.assert_close(far.project(v), near.project(v), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("x", [inputs(), 5.0 * inputs() + 3.0], ids=["standard", "wide"])
def test_named_gammas_follow_scikit_learn(x):
    assert resolve_kernel(x, "rbf", "auto", 3, 1.0).gamma == pytest.approx(1 / 3)
    scale = 1 / (3 * x.numpy().var())
    assert resolve_kernel(x, "rbf", "scale", 3, 1.0).gamma == pytest.approx(scale)


def test_constant_inputs_have_a_gamma():
    assert resolve_kernel(torch.ones(5, 2), "rbf", "scale", 3, 1.0).gamma == 1.0


@pytest.mark.parametrize("max_bytes", [KEPT, COMPUTED_AGAIN], ids=["kept", "computed again"])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kernel", ["linear", "rbf", "poly", l1_kernel])
def test_products_are_those_of_the_explicit_matrix(kernel, centred, max_bytes, monkeypatch):
    x = inputs(50)
    monkeypatch.setitem(rvm_basis._BLOCK_BYTES, "cpu", 50 * 8 * 20)  # blocks of 20 rows
    found = design(x, kernel, centred=centred, max_bytes=max_bytes)
    phi = resolve_kernel(x, kernel, 0.3, 3, 1.0)
    explicit = (x if kernel == "linear" else phi.evaluate(x, x)).T
    explicit = explicit - explicit.mean(1, keepdim=True) if centred else explicit
    explicit = explicit / explicit.norm(dim=1, keepdim=True)

    v = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = v[:, 0].square()
    some = torch.tensor([2, 0, 1])
    torch.testing.assert_close(found.rows(some), explicit[some])
    torch.testing.assert_close(found.project(v), explicit @ v)
    torch.testing.assert_close(found.project_squares(weights), explicit.square() @ weights)


def test_a_matrix_too_large_is_never_whole_in_memory(monkeypatch):
    x = inputs(200)
    monkeypatch.setitem(rvm_basis._BLOCK_BYTES, "cpu", 200 * 8 * 16)
    sizes = []
    original = DesignMatrix._compute

    def watched(self, which, out=None):
        rows = original(self, which, out)
        sizes.append(len(rows))
        return rows

    monkeypatch.setattr(DesignMatrix, "_compute", watched)
    design(x, max_bytes=200 * 200 * 8 - 1).project(x[:, :1])
    assert max(sizes) <= 16 < 200


def test_a_constant_is_told_from_a_function_that_hardly_varies():
    """0.1 has no exact mean in binary: what is left of it must not pass for a signal."""
    x = torch.full((100, 3), 0.1, dtype=torch.float64)
    x[:, 1] += 1e-12 * inputs(100, 1)[:, 0]
    x[:, 2] = inputs(100, 1)[:, 0]
    assert design(x, "linear").is_null.tolist() == [True, False, False]
    assert design(x, "linear", centred=False).is_null.tolist() == [False, False, False]
    x[:, 0] = 0.0
    assert design(x, "linear", centred=False).is_null.tolist() == [True, False, False]


def test_null_functions_project_to_zero():
    x = inputs()
    x[:, 1] = 7.0
    found = design(x, "linear")
    assert found.project(x)[1].abs().max() == 0
    assert found.rows(torch.tensor([1])).abs().max() == 0


# What cannot be used is refused, by name.


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([[1.0], [2.0]], TypeError, r"x must be a torch.Tensor, got list"),
        (torch.ones(4, 2).to_sparse(), TypeError, r"x is sparse.*to_dense"),
        (torch.ones(4, 2, dtype=torch.int64), TypeError, r"float64 or float32, got torch.int64"),
        (torch.ones(4, 2, dtype=torch.float16), TypeError, r"float64 or float32, got torch.float1"),
        (torch.ones(4), ValueError, r"\(n_samples, n_features\), got \(4,\).*reshape\(-1, 1\)"),
        (torch.ones(4, 0), ValueError, r"0 features, shape \(4, 0\)"),
        (torch.tensor([[1.0], [float("nan")]]), ValueError, r"x has 1 values.*NaN.*of 2"),
        (torch.tensor([[1.0], [float("inf")]]), ValueError, r"x has 1 values.*infinite"),
    ],
)
def test_unusable_inputs_are_refused(x, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        check_inputs(x, torch.ones(4))


@pytest.mark.parametrize(
    ("y", "error", "words"),
    [
        ([1.0, 2.0], TypeError, r"y must be a torch.Tensor, got list"),
        (torch.ones(3), ValueError, r"y must have shape \(4,\).*got \(3,\)"),
        (torch.ones(4, 1), ValueError, r"y must have shape \(4,\).*got \(4, 1\)"),
        (torch.tensor([0, 1, 2, float("nan")]), ValueError, r"y has 1 values.*of 4"),
    ],
)
def test_unusable_targets_are_refused(y, error, words):
    with pytest.raises(error, match=words):
        check_inputs(torch.ones(4, 2), y)


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match=r"n_samples = 1.*at least 2"):
        check_inputs(torch.ones(1, 2), torch.ones(1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cosine", 1.0, 3, 1.0), r"kernel must be one of .*'rbf'.* or a function, got 'cosine'"),
        (("rbf", 0.0, 3, 1.0), r"gamma must be a positive number.*got 0.0"),
        (("rbf", "width", 3, 1.0), r"gamma must be.*got 'width'"),
        (("poly", 1.0, 0, 1.0), r"degree must be an integer of at least 1, but is 0"),
        (("poly", 1.0, 2.5, 1.0), r"degree must be an integer.*but is 2.5"),
        (("precomputed", 1.0, 3, 1.0), r'(?s)square.*got shape \(40, 3\).*kernel="linear"'),
    ],
)
def test_unusable_kernels_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        resolve_kernel(inputs(), *arguments)


def test_an_overflowing_kernel_is_refused():
    with pytest.raises(ValueError, match=r"(?s)basis function 0 is not finite.*overflows"):
        design(1e60 * inputs(), "poly")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda a, b: (a @ b.T).sum(1), r"shape \(40, 16\) for a of shape \(40, 3\).*got \(40,\)"),
        (lambda a, b: (a @ b.T).numpy(), r"got ndarray"),
        (lambda a, b: (a @ b.T).float(), r"torch.float64.*got torch.float32"),
    ],
)
def test_a_kernel_function_of_the_wrong_kind_is_refused(function, words, monkeypatch):
    monkeypatch.setitem(rvm_basis._BLOCK_BYTES, "cpu", 1)  # blocks of 16 rows
    with pytest.raises(ValueError, match=words):
        design(inputs(), function)


def test_new_inputs_must_have_the_columns_that_were_fitted():
    x = inputs()
    chosen = resolve_kernel(x, "rbf", 1.0, 3, 1.0).at(x, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"2 features, shape \(5, 2\), but .* fitted to 3"):
        chosen(inputs(5, 2))
    with pytest.raises(ValueError, match=r"float32 on cpu, but .* fitted to torch.float64 on cpu"):
        chosen(x.float())


def test_new_precomputed_kernels_must_have_a_column_per_training_datum():
    gram = inputs(6, 6)
    chosen = resolve_kernel(gram, "precomputed", 1.0, 3, 1.0).at(gram, torch.tensor([1, 4]))
    assert torch.equal(chosen(inputs(9, 6)), inputs(9, 6)[:, [1, 4]])
    with pytest.raises(ValueError, match=r"shape \(9, 2\), but .* needs \(n_samples, 6\)"):
        chosen(inputs(9, 2))
