"""NumPy's arrays and torch's: the same functions, and the same regressions."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch

from bayes_svdo.inference import exact_regression_curves as curves
from bayes_svdo.inference.exact_regression import (
    DegenerateObjectiveError,
    fit_vdard_regression,
)
from bayes_svdo.inference.exact_regression_arrays import NumPyArrays, TorchArrays, arrays_on


def public(arrays):
    return {name for name in vars(arrays) if not name.startswith("_")}


def test_a_cpu_has_numpys_and_every_other_device_torchs() -> None:
    assert arrays_on(torch.device("cpu")) is NumPyArrays
    assert arrays_on(torch.device("cuda")) is TorchArrays
    assert arrays_on(torch.device("meta")) is TorchArrays
    assert public(NumPyArrays) == public(TorchArrays)


RNG = np.random.default_rng(0)
X = RNG.uniform(0.5, 3.0, (2, 3, 4))
SQUARE = RNG.standard_normal((2, 3, 4, 9))
SQUARE = SQUARE @ SQUARE.swapaxes(-1, -2)
LOWER = np.linalg.cholesky(SQUARE)
AT = np.array([[[0, 3], [5, 6], [8, 11]], [[12, 13], [17, 19], [20, 23]]])
CALLS = {
    **dict.fromkeys(
        ("copy", "exp", "expm1", "floor", "log", "log1p", "sqrt", "square", "whole"), (X,)
    ),
    "whole": (np.floor(X),),
    **dict.fromkeys(("amax", "amin"), (X, 1)),
    "minimum": (X, X[:, ::-1].copy()),
    **dict.fromkeys(("at_least", "at_most", "full_like"), (X, 1.5)),
    "zeros_like": (X,),
    "where": (X > 1.0, X, math.inf),
    "broadcast_to": (X[:, :1], (2, 3, 4)),
    "count": (5, X, 3),
    "replaced": (X, AT, X[..., :2]),
    "smallest": (X, 2),
    "diagonal": (SQUARE,),
    "cholesky": (SQUARE,),
    "inverse_of_lower": (LOWER,),
    "cholesky_solve": (LOWER, X),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_function_is_the_same_of_both(name, dtype) -> None:
    def cast(value):
        floating = isinstance(value, np.ndarray) and value.dtype == np.float64
        return value.astype(dtype) if floating else value

    arguments = [cast(value) for value in CALLS[name]]
    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments]
    found = getattr(NumPyArrays, name)(*arguments)
    expected = getattr(TorchArrays, name)(*tensors)
    for one, other in zip(
        found if isinstance(found, tuple) else (found,),
        expected if isinstance(expected, tuple) else (expected,),
        strict=True,
    ):
        assert isinstance(one, np.ndarray)
        assert one.dtype == other.numpy().dtype  # nothing is cast on the way
        np.testing.assert_allclose(one, other.numpy(), rtol=10 * np.finfo(dtype).eps)


@pytest.mark.parametrize(("arrays", "of"), [(NumPyArrays, np.array), (TorchArrays, torch.tensor)])
def test_joins_copies_and_views_are_what_the_ascent_takes_them_for(arrays, of) -> None:
    x = of([[4.0, 1.0], [1.0, 3.0]])
    assert arrays.stack((x, x), 1).shape == (2, 2, 2)
    assert arrays.concatenate((x, x), -1).shape == (2, 4)
    assert arrays.empty_like(x).shape == (2, 2)
    changed = arrays.replaced(x, of([0, 3]), of([7.0, 8.0]))
    assert changed.tolist() == [[7.0, 1.0], [1.0, 8.0]]
    assert x.tolist() == [[4.0, 1.0], [1.0, 3.0]]
    diagonal = arrays.diagonal(x)
    diagonal += 1.0
    assert x.tolist() == [[5.0, 1.0], [1.0, 4.0]]
    values, basis = arrays.eigh(x)
    assert (abs(basis @ (values[:, None] * basis.swapaxes(0, 1)) - x) < 1e-6).all()
    tensor = arrays.tensor(x)
    assert isinstance(tensor, torch.Tensor)
    assert arrays.array(tensor) is tensor or np.shares_memory(arrays.array(tensor), x)


@pytest.mark.parametrize("arrays", [NumPyArrays, TorchArrays])
def test_one_matrix_without_a_factor_does_not_stop_the_others(arrays) -> None:
    matrices = torch.stack((torch.eye(3), -torch.eye(3))).double()
    factor, failed = arrays.cholesky(arrays.array(matrices))
    assert failed.tolist() == [False, True]
    assert (factor[0] == arrays.array(torch.eye(3).double())).all()


@pytest.mark.parametrize("kl", get_args(curves.KL))
def test_the_curves_are_the_same_of_both(kl, request) -> None:
    x = torch.cat((torch.linspace(-60, 60, 4001), torch.tensor([math.inf]))).double()
    positive = torch.logspace(-20, 20, 4001, dtype=torch.float64)

    def values():
        found = curves.tabulate(kl, torch.float64, torch.device("cpu"))
        array, tensor = found.xp.array, found.xp.tensor
        pieces = found.kl_pieces(array(x))
        return (
            found.xp,
            *(tensor(v) for piece in pieces for v in (piece.value(), piece.slope())),
            tensor(found.optimal_log_alpha(array(positive - 1.0))),
            tensor(found.log_alpha_given_loc(array(positive))),
        )

    by_numpy = values()
    request.getfixturevalue("torch_arrays")
    by_torch = values()
    assert (by_numpy[0], by_torch[0]) == (NumPyArrays, TorchArrays)
    for one, other in zip(by_numpy[1:], by_torch[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def designs():
    """Regressions of every kind: (x, y, options)."""
    generator = torch.Generator().manual_seed(0)

    def data(*shape, correlation=0.0):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        shared = torch.randn((*shape[:-1], 1), generator=generator, dtype=torch.float64)
        x = math.sqrt(1 - correlation) * x + math.sqrt(correlation) * shared
        noise = torch.randn(shape[:-1], generator=generator, dtype=torch.float64)
        return x, x[..., :3].sum(-1) + 0.7 * noise

    yield from (("kl", *data(80, 12, correlation=0.5), {"kl": kl}) for kl in get_args(curves.KL))
    yield "wide", *data(40, 90), {"kl_weight": "bic"}
    yield "collinear", *data(120, 30, correlation=0.97), {"kl_weight": 0.5}
    yield "batch", *data(9, 60, 20, correlation=0.8), {"kl_weight": "aic"}
    yield "wide batch", *data(5, 25, 60), {"kl_weight": 4.0, "starts": ("zero", "ridge")}
    yield "known noise", *data(3, 50, 10), {"noise_precision": torch.tensor([0.5, 2.0, 9.0])}
    yield "bounded noise", *data(50, 10), {"min_noise": 0.8}
    yield "no intercept", *data(50, 10), {"fit_intercept": False, "starts": ("ridge",)}
    yield "alternation", *data(4, 60, 8), {"method": "alternating", "kl_weight": "bic"}
    yield "stopped", *data(4, 60, 20), {"max_iter": 2}
    yield "float32", *data(2, 80, 12), {"dtype": torch.float32}


@pytest.mark.parametrize(
    ("x", "y", "options"), [pytest.param(*d[1:], id=f"{d[0]}-{i}") for i, d in enumerate(designs())]
)
def test_both_reach_the_same(x, y, options, request) -> None:
    by_numpy = fit_vdard_regression(x, y, **options)
    request.getfixturevalue("torch_arrays")
    by_torch = fit_vdard_regression(x, y, **options)
    assert torch.equal(by_numpy.kept, by_torch.kept)
    tolerances = {torch.float64: (1e-6, 1e-11), torch.float32: (1e-3, 1e-5)}
    near, same = tolerances[by_torch.loc.dtype]  # weights as near as starts come to one maximum
    for name in ("loc", "sigma2", "relevance", "intercept", "beta", "elbo", "start_elbo"):
        one, other = getattr(by_numpy, name), getattr(by_torch, name)
        tolerance = same if name == "elbo" else near
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_what_is_found_is_the_users_own(problem) -> None:
    """No memory shared, no inference tensors, and nothing that is not to be written to."""
    x, y = problem()
    before = x.clone(), y.clone()
    fit = fit_vdard_regression(x, y, starts=("zero",))
    fields = {n: v for n, v in vars(fit).items() if isinstance(v, torch.Tensor)}
    places = {v.untyped_storage().data_ptr() for v in (x, y, *fields.values())}
    assert len(places) == len(fields) + 2
    for value in fields.values():
        assert not value.is_inference()
        value.zero_()
    again = fit_vdard_regression(x, y, starts=("zero",))  # tables and data are as they were
    assert again.kept.any()
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_options_of_numpy_leave_the_result_in_single_precision(problem) -> None:
    options = {"min_noise": np.float64(0.5), "kl_weight": np.float64(2.0), "tol": np.float64(1e-6)}
    fit = fit_vdard_regression(*problem(), **options, dtype=torch.float32)
    found = {v.dtype for v in vars(fit).values() if isinstance(v, torch.Tensor)}
    assert found == {torch.float32, torch.int64, torch.bool}


def test_a_default_device_elsewhere_leaves_errors_as_they_are(problem) -> None:
    x, y = (torch.stack((v, v)) for v in problem())
    y[0] = x[0, :, 0]
    fit_vdard_regression(*problem())  # the tables are there
    with (
        torch.device("meta"),
        pytest.raises(DegenerateObjectiveError, match=r"without error in problem\(s\) 0:"),
    ):
        fit_vdard_regression(x, y)


def test_gradients_may_be_asked_of_a_relevance_but_there_are_none() -> None:
    relevance = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    assert not curves.optimal_log_alpha(relevance).requires_grad


def test_torchs_arrays_are_deterministic_where_that_is_asked_for(problem, torch_arrays) -> None:
    expected = fit_vdard_regression(*problem())
    torch.use_deterministic_algorithms(True)
    try:
        found = fit_vdard_regression(*problem())
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found.loc, expected.loc)
