"""What scikit-learn, joblib and users do with estimators, whatever their settings."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from bayes_svdo.inference.estimators import (
    L1LogisticRegression,
    RVMClassifier,
    RVMRegressor,
    VDARDClassifier,
    VDARDRegressor,
)

QUICK = VDARDClassifier(max_iter=60, lr=0.1, random_state=0)
ALL = (VDARDRegressor(), RVMRegressor(), QUICK, L1LogisticRegression(), RVMClassifier())
GRIDS = (
    {"kl_weight": [1.0, "aic", "bic", "5%"], "kl": ["exact", "empirical_bayes"]},
    {"kernel": ["rbf", "linear"], "gamma": np.array([0.02, 0.1])},
    {"kl_weight": np.array([0.5, 2.0]), "batch_size": np.array([30, 200])},
    {"C": np.logspace(-2, 0, 3), "fit_intercept": [True, False]},
    {"kernel": ["rbf", "linear"], "gamma": ["scale", 0.1]},
)
SETTINGS = (
    VDARDRegressor(fit_intercept=False),
    VDARDRegressor(kl_weight="bic"),
    VDARDRegressor(kl="empirical_bayes", kl_weight="5%", min_noise=1e-3),
    VDARDRegressor(noise_precision=4.0),
    RVMRegressor(fit_intercept=False),
    RVMRegressor(kernel="linear", fit_intercept=False, method="em"),
    RVMRegressor(kernel="poly", method="mackay"),
    RVMRegressor(kernel="precomputed"),
    RVMClassifier(kernel="linear", fit_intercept=False),
    RVMClassifier(kernel="linear", method="mackay"),
    RVMClassifier(kernel="poly", degree=2),
    RVMClassifier(kernel="precomputed"),
    L1LogisticRegression(fit_intercept=False, C=10.0),
)
NAMES = [type(estimator).__name__ for estimator in ALL]
each = pytest.mark.parametrize("estimator", ALL, ids=NAMES)


def expected_failures(estimator: Any) -> dict[str, str]:
    if isinstance(estimator, RVMClassifier) and estimator.kernel == "precomputed":
        return {"check_decision_proba_consistency": "it fits features, and not their kernel"}
    return {}


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(list(SETTINGS), expected_failed_checks=expected_failures)
def test_scikit_learn_check_of_other_settings(estimator, check) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def data() -> dict[bool, tuple[np.ndarray, np.ndarray]]:
    """By whether the target is a class."""
    features, labels = load_breast_cancer(return_X_y=True)
    x, y = load_diabetes(return_X_y=True)
    return {True: (features[:120, :8], labels[:120]), False: (x[:120], y[:120])}


def data_of(estimator: Any, data: Any) -> tuple[np.ndarray, np.ndarray]:
    found: tuple[np.ndarray, np.ndarray] = data[hasattr(estimator, "predict_proba")]
    return found


@pytest.mark.parametrize(("estimator", "grid"), list(zip(ALL, GRIDS, strict=True)), ids=NAMES)
def test_a_grid_is_searched_in_a_pipeline(estimator, grid, data) -> None:
    x, y = data_of(estimator, data)
    name = type(estimator).__name__.lower()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), estimator),
        {f"{name}__{option}": values for option, values in grid.items()},
        cv=2,
        error_score="raise",
    ).fit(x, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    chosen = {key.split("__")[1]: value for key, value in search.best_params_.items()}
    alone = clone(estimator).set_params(**chosen)
    expected = alone.fit(StandardScaler().fit_transform(x), y).predict(
        StandardScaler().fit_transform(x)
    )
    np.testing.assert_array_equal(search.predict(x), expected)


@each
def test_a_clone_has_the_options_and_nothing_that_was_fitted(estimator, data) -> None:
    fitted = clone(estimator).fit(*data_of(estimator, data))
    copy = clone(fitted)
    assert repr(copy.get_params()) == repr(fitted.get_params())
    assert not [name for name in vars(copy) if name.endswith("_")]
    np.testing.assert_array_equal(
        copy.fit(*data_of(estimator, data)).predict(data_of(estimator, data)[0]),
        fitted.predict(data_of(estimator, data)[0]),
    )


@each
def test_unpickled_in_a_pipeline_it_predicts_the_same(estimator, data) -> None:
    x, y = data_of(estimator, data)
    fitted = make_pipeline(StandardScaler(), clone(estimator)).fit(x, y)
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))
    if hasattr(fitted, "predict_proba"):
        np.testing.assert_array_equal(again.predict_proba(x), fitted.predict_proba(x))


class _Seen(pickle.Pickler):
    """Notes the devices of all tensors that go into a pickle."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.devices: list[str] = []

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.Tensor):
            self.devices.append(obj.device.type)
        return NotImplemented


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: bytes) -> int:
        return len(data)


def devices_of_pickled(estimator: Any) -> set[str]:
    pickler = _Seen(_Nowhere())
    pickler.dump(estimator)
    return set(pickler.devices)


@each
def test_a_pickle_holds_tensors_of_the_cpu_alone(estimator, data) -> None:
    fitted = clone(estimator).fit(*data_of(estimator, data))
    assert devices_of_pickled(fitted) == ({"cpu"} if hasattr(fitted, "_machine") else set())


@pytest.mark.parametrize("machine", [RVMRegressor(), RVMClassifier()])
def test_a_machine_that_is_elsewhere_is_pickled_from_the_cpu(machine, data, monkeypatch) -> None:
    """No other device is needed for it to be asked."""
    fitted = clone(machine).fit(*data_of(machine, data))
    asked = []
    kind = type(fitted._machine)
    move = kind.to
    monkeypatch.setattr(
        kind, "to", lambda self, device: asked.append(str(device)) or move(self, device)
    )
    state = fitted.__getstate__()
    assert asked == ["cpu"]
    assert state["_machine"] is not fitted._machine
    elsewhere = move(fitted._machine, "meta")
    parts = getattr(elsewhere, "machines", (elsewhere,))
    tensors = [v for part in parts for v in vars(part).values() if isinstance(v, torch.Tensor)]
    tensors += [v for part in parts for v in vars(part.basis).values() if hasattr(v, "device")]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert elsewhere.device.type == "meta"


@pytest.mark.parametrize("machine", [RVMRegressor(), RVMClassifier()])
def test_unpickled_without_its_device_it_stays_on_the_cpu(machine, data) -> None:
    x, y = data_of(machine, data)
    fitted = clone(machine).fit(x, y)
    expected = fitted.predict(x)
    fitted.device = "cuda:99"  # as if it had been fitted there
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(x), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("machine", [RVMRegressor(), RVMClassifier(), RVMRegressor(kernel="poly")])
def test_fitted_on_cuda_it_is_unpickled_with_and_without_cuda(machine, data, monkeypatch) -> None:
    x, y = data_of(machine, data)
    fitted = clone(machine).set_params(device="cuda").fit(x, y)
    assert fitted._machine.device.type == "cuda"
    assert devices_of_pickled(fitted) == {"cpu"}
    text = pickle.dumps(fitted)
    again = pickle.loads(text)
    assert again._machine.device.type == "cuda"
    np.testing.assert_array_equal(again.predict(x), fitted.predict(x))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = pickle.loads(text)
    assert here._machine.device.type == "cpu"
    np.testing.assert_allclose(here.predict(x), fitted.predict(x), rtol=1e-6)


@each
def test_a_fit_leaves_the_random_numbers_of_the_user(estimator, data) -> None:
    before = torch.get_rng_state()
    clone(estimator).fit(*data_of(estimator, data))
    assert torch.equal(torch.get_rng_state(), before)


@each
def test_the_default_dtype_does_not_matter(estimator, data) -> None:
    x, y = data_of(estimator, data)
    expected = clone(estimator).fit(x, y).predict(x)
    before = torch.get_default_dtype()
    assert before == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        found = clone(estimator).fit(x, y).predict(x)
    finally:
        torch.set_default_dtype(before)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("machine", [RVMRegressor, RVMClassifier])
def test_a_kernel_between_too_few_data_is_named_with_both_shapes(machine, data) -> None:
    x, y = data_of(machine, data)
    kernel = rbf_kernel(x, gamma=1e-4)
    fitted = machine(kernel="precomputed").fit(kernel, y)
    words = (
        r'kernel="precomputed" X must have the shape \(n_samples, n_samples_fit\) = \(7, 120\), '
        r"but has \(7, 7\)"
    )
    for bad in (kernel[:7, :7], torch.as_tensor(kernel[:7, :7]), kernel[:7, :7].tolist()):
        with pytest.raises(ValueError, match=words):
            fitted.predict(bad)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        fitted.predict(np.full((7, 7), np.nan))
    score = cross_val_score(machine(kernel="precomputed"), kernel, y, cv=2, error_score="raise")
    assert np.isfinite(score).all()


@pytest.mark.parametrize("machine", [RVMRegressor, RVMClassifier])
def test_a_kernel_in_a_data_frame_keeps_the_order_of_its_columns(machine, data) -> None:
    x, y = data_of(machine, data)
    frame = pd.DataFrame(rbf_kernel(x, gamma=1e-4), columns=[f"point {i}" for i in range(len(x))])
    fitted = machine(kernel="precomputed").fit(frame, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fitted.predict(frame)
    plain = machine(kernel="precomputed").fit(frame.to_numpy(), y)
    np.testing.assert_array_equal(found, plain.predict(frame.to_numpy()))
    with pytest.raises(ValueError, match="feature names should match"):
        fitted.predict(frame[frame.columns[::-1]])


@pytest.mark.parametrize("machine", [RVMRegressor, RVMClassifier])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_kernel_of_ones_own_that_is_not_finite_is_named(machine, value, data) -> None:
    x, y = data_of(machine, data)
    x = StandardScaler().fit_transform(x)
    spoils = []

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        found = torch.exp(-0.1 * torch.cdist(a, b))
        return found[:, : 1 if spoils == ["shape"] else None] * (
            value if spoils == ["value"] else 1
        )

    fitted = machine(kernel=kernel).fit(x, y)
    assert len(fitted.relevance_) > 1
    spoils.append("value")
    words = r"kernel\(a, b\) must return finite numbers, got \d+ of \d+ that are NaN or infinite"
    with pytest.raises(ValueError, match=words):
        fitted.predict(x)
    with pytest.raises(ValueError, match=words):
        machine(kernel=kernel).fit(x, y)
    spoils[:] = ["shape"]
    with pytest.raises(ValueError, match=r"kernel\(a, b\) must return a tensor of shape"):
        fitted.predict(x)


@pytest.mark.parametrize("machine", [RVMRegressor, RVMClassifier])
def test_a_named_kernel_that_overflows_at_new_data_says_so(machine, data) -> None:
    x, y = data_of(machine, data)
    x = StandardScaler().fit_transform(x)
    fitted = machine(kernel="poly").fit(x, y)
    with pytest.raises(ValueError, match=r"kernel='poly' overflows torch.float64 at this x"):
        fitted.predict(x * 1e200)
