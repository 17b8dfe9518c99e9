"""VD-ARD regression and the RVM: an answer that is right, or an error that says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.base import clone
from torch import Tensor

from bayes_svdo.inference.estimators import RVMClassifier, RVMRegressor, VDARDRegressor
from bayes_svdo.inference.exact_regression import DegenerateObjectiveError, fit_vdard_regression
from bayes_svdo.inference.relevance_vector_machine import (
    NoiseBoundWarning,
    fit_rvm_classification,
    fit_rvm_regression,
)

N, D = 40, 5
GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((N, D))
Y = X[:, 0] + 0.1 * GENERATOR.standard_normal(N)
LABELS = (X[:, 0] + 0.5 * GENERATOR.standard_normal(N) > 0).astype(int)
X_TORCH, Y_TORCH, LABELS_TORCH = map(torch.from_numpy, (X, Y, LABELS))
NAN, INF = float("nan"), float("inf")

ESTIMATORS = {
    "vdard": (VDARDRegressor(), Y),
    "rvm": (RVMRegressor(), Y),
    "rvm linear": (RVMRegressor(kernel="linear"), Y),
    "rvc": (RVMClassifier(), LABELS),
    "rvc linear": (RVMClassifier(kernel="linear"), LABELS),
}
FUNCTIONS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "vdard": (fit_vdard_regression, Y_TORCH),
    "rvm": (fit_rvm_regression, Y_TORCH),
    "rvc": (fit_rvm_classification, LABELS_TORCH),
}
every_estimator = pytest.mark.parametrize(
    ("estimator", "y"), ESTIMATORS.values(), ids=ESTIMATORS.keys()
)
linear_estimator = pytest.mark.parametrize(
    ("estimator", "y"),
    [ESTIMATORS[name] for name in ("vdard", "rvm linear", "rvc linear")],
    ids=["vdard", "rvm", "rvc"],
)
every_function = pytest.mark.parametrize(("fit", "y"), FUNCTIONS.values(), ids=FUNCTIONS.keys())


def fitted(estimator: Any, x: Any, y: Any) -> Any:
    return clone(estimator).fit(x, y)


def changed(values: Any, value: float) -> Any:
    copy = values.clone().double() if isinstance(values, Tensor) else values.astype(float)
    copy[3] = value
    return copy


@every_estimator
@pytest.mark.parametrize("value", [NAN, INF])
def test_values_that_are_not_finite_are_refused_by_name(estimator, y, value):
    with pytest.raises(ValueError, match=r"Input X contains (NaN|infinity)"):
        fitted(estimator, changed(X, value), y)
    with pytest.raises(ValueError, match=r"Input y contains (NaN|infinity)"):
        fitted(estimator, X, changed(y, value))
    with pytest.raises(ValueError, match=r"Input X contains (NaN|infinity)"):
        fitted(estimator, X, y).predict(changed(X, value))


@every_function
@pytest.mark.parametrize("value", [NAN, INF])
def test_functions_refuse_values_that_are_not_finite_by_name(fit, y, value):
    with pytest.raises(ValueError, match=r"^x .* NaN or infini"):
        fit(changed(X_TORCH, value), y)
    with pytest.raises(ValueError, match=r"^y .* NaN or infini"):
        fit(X_TORCH, changed(y, value))
    found = fit(X_TORCH, y)
    predict = getattr(found, "predict_proba", found.predict)
    with pytest.raises(ValueError, match=r"^x .* NaN or infini"):
        predict(changed(X_TORCH, value))


@linear_estimator
def test_a_constant_feature_has_no_weight_and_changes_no_other(estimator, y):
    x = X.copy()
    x[:, 2] = 7.3
    found, without = fitted(estimator, x, y), fitted(estimator, np.delete(x, 2, 1), y)
    coefficients = np.ravel(found.coef_)
    assert coefficients[2] == 0
    np.testing.assert_allclose(np.delete(coefficients, 2), np.ravel(without.coef_), rtol=1e-6)


@every_estimator
def test_constant_features_leave_the_mean(estimator, y):
    found = fitted(estimator, np.full((N, 3), 2.0), y)
    if hasattr(found, "classes_"):
        share = found.predict_proba(np.full((1, 3), 5.0))[0, 1]
        assert share == pytest.approx(y.mean(), abs=0.01)
    else:
        np.testing.assert_allclose(found.predict(np.full((2, 3), 5.0)), y.mean())


@pytest.mark.parametrize("value", [3.0, 0.0])
def test_a_constant_target_is_predicted(value):
    y = np.full(N, value)
    np.testing.assert_allclose(VDARDRegressor().fit(X, y).predict(X), value)
    with pytest.warns(NoiseBoundWarning, match="y is constant"):
        np.testing.assert_allclose(RVMRegressor().fit(X, y).predict(X), value)
    with pytest.raises(ValueError, match="one class only"):
        RVMClassifier().fit(X, y)


def test_functions_on_a_constant_target():
    y = torch.full((N,), 3.1, dtype=torch.float64)
    with pytest.raises(DegenerateObjectiveError, match=r"y is constant(.|\n)*noise_precision"):
        fit_vdard_regression(X_TORCH, y)
    assert not fit_vdard_regression(X_TORCH, y, noise_precision=1.0).kept.any()
    with pytest.warns(NoiseBoundWarning, match="y is constant"):
        assert fit_rvm_regression(X_TORCH, y).beta == INF
    with pytest.raises(ValueError, match=r"single class, \[3.*two"):
        fit_rvm_classification(X_TORCH, y.round())


@every_function
def test_one_observation_is_too_few(fit, y):
    with pytest.raises(ValueError, match=r"n_samples = 1.*least 2|1 observation.*least 2"):
        fit(X_TORCH[:1], y[:1])


@every_estimator
def test_estimators_need_data_and_features(estimator, y):
    with pytest.raises(ValueError, match=r"n_samples = 1|one class only"):
        fitted(estimator, X[:1], y[:1])
    with pytest.raises(ValueError, match=r"0 sample"):
        fitted(estimator, X[:0], y[:0])
    with pytest.raises(ValueError, match=r"0 feature"):
        fitted(estimator, X[:, :0], y)


def test_no_features():
    found = fit_vdard_regression(X_TORCH[:, :0], Y_TORCH)
    assert found.loc.shape == (0,)
    assert float(found.intercept) == pytest.approx(Y.mean())
    for fit, y in (FUNCTIONS["rvm"], FUNCTIONS["rvc"]):
        with pytest.raises(ValueError, match=r"x has 0 features"):
            fit(X_TORCH[:, :0], y)


@linear_estimator
def test_a_column_given_twice_counts_once(estimator, y):
    found, once = fitted(estimator, np.hstack([X, X]), y), fitted(estimator, X, y)
    both = np.ravel(found.coef_).reshape(2, D)
    assert (np.count_nonzero(both, axis=0) <= 1).all()
    np.testing.assert_allclose(both.sum(0), np.ravel(once.coef_), rtol=1e-5, atol=1e-8)


@every_estimator
def test_sparse_matrices_are_refused_by_name(estimator, y):
    with pytest.raises(TypeError, match=r"Sparse data was passed(.|\n)*toarray"):
        fitted(estimator, csr_matrix(X), y)
    with pytest.raises(TypeError, match=r"Sparse data was passed(.|\n)*toarray"):
        fitted(estimator, X, y).predict(csr_matrix(X))
    with pytest.raises(TypeError, match=r"Sparse(.|\n)*to_dense"):
        fitted(estimator, X_TORCH.to_sparse(), y)


@every_function
def test_functions_refuse_what_is_no_dense_real_tensor(fit, y):
    for bad in (X_TORCH.to_sparse(), X, X_TORCH + 0j, X.tolist()):
        with pytest.raises(TypeError, match=r"^x (must be|is sparse)"):
            fit(bad, y)
    for bad in (y.to_sparse(), y.numpy(), y + 0j):
        with pytest.raises(TypeError, match=r"^y must be"):
            fit(X_TORCH, bad)
    found = fit(X_TORCH, y)
    predict = getattr(found, "predict_proba", found.predict)
    for bad in (X_TORCH.to_sparse(), X):
        with pytest.raises(TypeError, match=r"^x (must be|is sparse)"):
            predict(bad)


@every_estimator
@pytest.mark.parametrize(
    "same",
    [
        pytest.param(np.asfortranarray, id="fortran"),
        pytest.param(lambda x: np.repeat(x, 2, 0)[::2], id="strided"),
        pytest.param(lambda x: x[::-1][::-1], id="negative strides"),
        pytest.param(lambda x: torch.from_numpy(x).T.contiguous().T, id="torch strided"),
        pytest.param(lambda x: torch.from_numpy(x).requires_grad_(), id="torch with grad"),
    ],
)
def test_memory_layout_does_not_matter(estimator, y, same):
    np.testing.assert_allclose(
        fitted(estimator, same(X), y).predict(same(X)), fitted(estimator, X, y).predict(X)
    )


@every_estimator
def test_read_only_arrays_are_taken_and_left_alone(estimator, y):
    x = X.copy()
    x.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(estimator, x, y).predict(x)
    np.testing.assert_array_equal(x, X)


@every_estimator
@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.bool_, np.float32])
def test_numbers_of_any_type_are_numbers(estimator, y, dtype):
    x = (10 * X).astype(dtype)
    np.testing.assert_allclose(
        fitted(estimator, x, y).predict(x), fitted(estimator, x.astype(float), y).predict(x)
    )


def test_half_precision_tensors_are_taken():
    found = VDARDRegressor().fit(X_TORCH.bfloat16(), Y_TORCH)
    np.testing.assert_allclose(found.coef_, VDARDRegressor().fit(X, Y).coef_, atol=0.01)


def test_functions_say_which_dtype():
    np.testing.assert_allclose(
        fit_vdard_regression((10 * X_TORCH).long(), Y_TORCH).loc,
        fit_vdard_regression((10 * X_TORCH).long().double(), Y_TORCH).loc,
    )
    for fit, y in (FUNCTIONS["rvm"], FUNCTIONS["rvc"]):
        with pytest.raises(TypeError, match=r"x must be float64 or float32, got torch.int64"):
            fit((10 * X_TORCH).long(), y)


@every_estimator
def test_wrong_shapes_are_refused(estimator, y):
    with pytest.raises(ValueError, match=r"Expected 2D array, got 1D"):
        fitted(estimator, X[:, 0], y)
    with pytest.raises(ValueError, match=r"\[40, 39\]"):
        fitted(estimator, X, y[:-1])
    with pytest.raises(ValueError, match=r"1d array, got an array of shape \(40, 2\)"):
        fitted(estimator, X, np.stack([y, y], 1))
    with pytest.raises(ValueError, match=r"X has 3 features.*expecting 5"):
        fitted(estimator, X, y).predict(X[:, :3])


@every_function
def test_functions_refuse_wrong_shapes(fit, y):
    with pytest.raises(ValueError, match=r"^x must have shape.*\(40,\)"):
        fit(X_TORCH[:, 0], y)
    with pytest.raises(ValueError, match=r"\(39,\)"):
        fit(X_TORCH, y[:-1])
    found = fit(X_TORCH, y)
    predict = getattr(found, "predict_proba", found.predict)
    with pytest.raises(ValueError, match=r"^x (has|must have).*(3|5)"):
        predict(X_TORCH[:, :3])


@pytest.mark.parametrize(
    ("estimator", "y"), [(RVMRegressor(), Y), (RVMClassifier(), LABELS)], ids=["rvm", "rvc"]
)
def test_kernel_of_the_wrong_shape(estimator, y):
    kernel = np.exp(-((X[:, None] - X) ** 2).sum(-1) / 20)
    machine = clone(estimator).set_params(kernel="precomputed")
    with pytest.raises(ValueError, match=r"square kernel matrix.*\(40, 10\)"):
        fitted(machine, kernel[:, :10], y)
    machine = fitted(machine, kernel, y)
    with pytest.raises(ValueError, match=r"expecting 40 features"):
        machine.predict(kernel[:5, machine.relevance_])
    assert machine.predict(kernel[:5]).shape == (5,)
    own = clone(estimator).set_params(kernel=lambda a, b: a)
    with pytest.raises(
        ValueError, match=r"kernel\(a, b\) must return a tensor of shape \(40, 40\)"
    ):
        fitted(own, X, y)


def test_functions_with_a_kernel_of_the_wrong_shape():
    kernel = torch.exp(-torch.cdist(X_TORCH, X_TORCH).square() / 20)
    machine = fit_rvm_regression(kernel, Y_TORCH, kernel="precomputed")
    with pytest.raises(ValueError, match=r"precomputed kernel needs \(n_samples, 40\)"):
        machine.predict(kernel[:5, machine.relevance])


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_units_out_of_reach_of_a_square(unit):
    """VD-ARD scales by the largest value first; the RVM says that it cannot."""
    found = VDARDRegressor().fit(X * unit, Y)
    np.testing.assert_allclose(found.coef_ * unit, VDARDRegressor().fit(X, Y).coef_, rtol=1e-6)
    for machine, y in ((RVMRegressor, Y), (RVMClassifier, LABELS)):
        with pytest.raises(ValueError, match=r"basis function 0(.|\n)*Try scaled inputs"):
            machine(kernel="linear").fit(X * unit, y)


def test_a_width_that_cannot_be_found_is_an_error():
    with pytest.raises(ValueError, match=r'gamma="scale"(.|\n)*scaled inputs'):
        RVMRegressor().fit(X * 1e-200, Y)
    constant = fit_rvm_regression(torch.full_like(X_TORCH, 1e-200), Y_TORCH, kernel="rbf")
    assert len(constant.weights) == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kl_weight": -1.0}, ValueError, r"kl_weight must be positive and finite, got -1"),
        ({"kl_weight": NAN}, ValueError, r"kl_weight must be positive and finite, got nan"),
        ({"kl_weight": None}, TypeError, r'kl_weight must be a positive number, "aic".*None'),
        ({"kl_weight": "many"}, ValueError, r"kl_weight must be a positive number.*'many'"),
        ({"kl": "best"}, ValueError, r"kl must be one of 'exact'.*'best'"),
        ({"min_noise": 2}, ValueError, r"min_noise must be in \[0, 1\), got 2"),
        ({"min_noise": "none"}, TypeError, r"min_noise must be a number, got 'none'"),
        ({"max_iter": 0}, ValueError, r"max_iter must be at least 1, got 0"),
        ({"max_iter": 1.5}, TypeError, r"max_iter must be an integer, got 1.5"),
        ({"tol": "a"}, TypeError, r"tol must be a number or None, got 'a'"),
        ({"tol": NAN}, ValueError, r"tol must be positive, got nan"),
    ],
)
def test_vdard_options(options, error, message):
    with pytest.raises(error, match=message):
        VDARDRegressor(**options).fit(X, Y)


@pytest.mark.parametrize("estimator", [RVMRegressor(), RVMClassifier()], ids=["rvm", "rvc"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": "rfb"}, r"kernel must be one of.*'rfb'"),
        ({"gamma": -1}, r"gamma must be a positive number.*-1"),
        ({"kernel": "poly", "degree": 2.5}, r"degree must be an integer of at least 1, but is 2.5"),
        ({"kernel": "poly", "coef0": NAN}, r"coef0 must be a finite number, got nan"),
        ({"tol": 0}, r"tol must be positive and finite, in nats, got 0"),
        ({"max_iter": 0}, r"max_iter must be an integer of at least 1, but is 0"),
    ],
)
def test_rvm_options(estimator, options, message):
    y = LABELS if isinstance(estimator, RVMClassifier) else Y
    with pytest.raises(ValueError, match=message):
        clone(estimator).set_params(**options).fit(X, y)
