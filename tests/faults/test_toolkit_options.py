"""Every option of the ARD toolkit: what it cannot be is refused by its name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from bayes_svdo.inference.estimators import (
    L1LogisticRegression,
    RVMClassifier,
    RVMRegressor,
    VDARDClassifier,
    VDARDRegressor,
)
from bayes_svdo.inference.exact_regression import fit_vdard_regression
from bayes_svdo.inference.l1 import fit_l1_logistic, l1_logistic_path
from bayes_svdo.inference.l1_cross_validation import cross_validate_l1
from bayes_svdo.inference.relevance_vector_machine import (
    fit_rvm_classification,
    fit_rvm_regression,
)

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((40, 3))
Y = X[:, 0] + 0.3 * GENERATOR.standard_normal(40)
LABELS = (Y > 0).astype(int)
X_TORCH, Y_TORCH, LABELS_TORCH = map(torch.from_numpy, (X, Y, LABELS))
NAN, INF = float("nan"), float("inf")
SMALL = {"poly": {"kernel": "poly", "max_iter": 20}, "svi": {"max_iter": 3}}


def estimator(kind: Callable[..., Any], y: np.ndarray, **settings: Any) -> Callable[..., Any]:
    return lambda **options: kind(**(settings | options)).fit(X, y)


def function(fit: Callable[..., Any], y: torch.Tensor, **settings: Any) -> Callable[..., Any]:
    return lambda **options: fit(X_TORCH, y, **(settings | options))


SUBJECTS = {
    "VDARDRegressor": estimator(VDARDRegressor, Y),
    "VDARDClassifier": estimator(VDARDClassifier, LABELS, **SMALL["svi"]),
    "L1LogisticRegression": estimator(L1LogisticRegression, LABELS),
    "RVMRegressor": estimator(RVMRegressor, Y, **SMALL["poly"]),
    "RVMClassifier": estimator(RVMClassifier, LABELS, **SMALL["poly"]),
    "fit_vdard_regression": function(fit_vdard_regression, Y_TORCH),
    "fit_rvm_regression": function(fit_rvm_regression, Y_TORCH, **SMALL["poly"]),
    "fit_rvm_classification": function(fit_rvm_classification, LABELS_TORCH, **SMALL["poly"]),
    "fit_l1_logistic": function(fit_l1_logistic, LABELS_TORCH),
    "cross_validate_l1": function(cross_validate_l1, LABELS_TORCH, Cs=2, cv=2),
}

NO_NUMBER = ("a", True, np.True_, [1.0], np.ones(2), NAN, 1j)
NO_COUNT = (*NO_NUMBER, None, 2.5, 2.0, 0, -1, INF)
NO_POSITIVE = (*NO_NUMBER, 0, -1, INF)
NO_NAME = ("nothing", None, True, 3, ["fast"], np.ones(2))
NO_FLAG = ("yes", None, 2, 0.5, np.ones(2))
NO_SEED = ("a", True, 2.5, -1, NAN, [1.0], np.random.default_rng(0))
NO_DEVICE = ("gpu", None, 2.5, True, np.ones(2))
# Option: values it cannot have, and NumPy's numbers that it can.
OPTIONS: dict[str, dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "VDARDRegressor": {
        "kl": (NO_NAME, ()),
        "kl_weight": ((*NO_POSITIVE, None, "0%", "%"), (np.float32(2), np.int64(2))),
        "fit_intercept": (NO_FLAG, (np.True_, np.int64(0))),
        "noise_precision": (("a", True, np.True_, NAN, 1j, 0, -1, INF), (np.float32(2),)),
        "min_noise": ((*NO_NUMBER, -0.1, 1, INF), (np.float32(0.1),)),
        "max_iter": (NO_COUNT, (np.int32(50),)),
        "tol": ((*NO_NUMBER, 0, -1), (np.float32(1e-3),)),
        "device": (NO_DEVICE, ()),
    },
    "VDARDClassifier": {
        "kl": (NO_NAME, ()),
        "kl_weight": ((*NO_NUMBER, None, -1, INF), (np.float32(2), np.int64(2))),
        "threshold": ((*NO_NUMBER, None), (np.float32(3), np.int64(3))),
        "init_log_sigma2": ((*NO_NUMBER, None, INF), (np.float32(-8), np.int64(-8))),
        "standardize": (NO_FLAG, (np.True_,)),
        "lr": ((*NO_POSITIVE, None), (np.float32(0.01),)),
        "batch_size": (NO_COUNT, (np.int64(10),)),
        "max_iter": (NO_COUNT, (np.int32(2),)),
        "kl_warmup": (("a", None, 0.3, (0.5, 0.3), (0.0, 2.0), (NAN, 1.0), True), ()),
        "random_state": (
            ("a", True, 2.5, -1, NAN, [1.0], np.random.default_rng(0)),
            (np.int64(3),),
        ),
        "device": (NO_DEVICE, ()),
    },
    "L1LogisticRegression": {
        "C": ((*NO_POSITIVE, None), (np.float32(0.5), np.int64(1))),
        "fit_intercept": (NO_FLAG, (np.True_,)),
        "tol": (NO_POSITIVE, (np.float32(1e-3),)),
        "max_iter": (NO_COUNT, (np.int32(50),)),
        "device": (NO_DEVICE, ()),
    },
    "RVMRegressor": {
        "kernel": (NO_NAME, ()),
        "gamma": ((*NO_POSITIVE, None), (np.float32(0.5), np.int64(1))),
        "degree": (NO_COUNT, (np.int64(2),)),
        "coef0": ((*NO_NUMBER, None, INF), (np.float32(1), np.int64(1))),
        "fit_intercept": (NO_FLAG, (np.True_,)),
        "method": (NO_NAME, ()),
        "tol": ((*NO_POSITIVE, None), (np.float32(1e-3),)),
        "max_iter": (NO_COUNT, (np.int32(50),)),
        "device": (NO_DEVICE, ()),
    },
    "fit_vdard_regression": {
        "method": (NO_NAME, ()),
        "starts": (("zero", (), ("nowhere",), (1,), 3, [np.ones(2)]), ()),
        "dtype": ((torch.float16, "float64", np.float64), ()),
    },
    "fit_rvm_regression": {
        "beta": (NO_POSITIVE, (np.float32(4), np.int64(4))),
        "min_noise": ((*NO_NUMBER, 0, -1, 1, INF), (np.float32(0.01),)),
        "max_kernel_bytes": (("a", None, True, 2.5, -1, NAN), (np.int64(10**6), 0)),
    },
    "fit_l1_logistic": {"solver": (NO_NAME, ()), "tol": (NO_POSITIVE, (np.float32(1e-3),))},
    "cross_validate_l1": {
        "Cs": (("a", None, True, 0, 2.5), (np.int64(2),)),
        "tol": (NO_POSITIVE, (np.float32(1e-3),)),
        "path_tol": ((*NO_POSITIVE, None), (np.float32(1e-3),)),
        "max_iter": (NO_COUNT, (np.int32(50),)),
        "random_state": (("a", True, 2.5, NAN, -1, 2**40), (np.int64(3),)),
        "scoring": (NO_NAME, ()),
        "rule": (NO_NAME, ()),
        "fit_intercept": (NO_FLAG, (np.True_,)),
    },
}
OPTIONS["RVMClassifier"] = OPTIONS["RVMRegressor"]
OPTIONS["fit_rvm_classification"] = {
    "max_kernel_bytes": OPTIONS["fit_rvm_regression"]["max_kernel_bytes"]
}
# What an error calls the option, where it is not by its name alone.
WORDS = {"kl": "(kl must|the KL)", "Cs": "(Cs|C) must", "device": "device", "starts": "starts"}

every_option = pytest.mark.parametrize(
    ("subject", "option"),
    [(subject, option) for subject, options in OPTIONS.items() for option in options],
    ids=lambda name: name,
)


@pytest.mark.parametrize(
    "kind", [VDARDRegressor, VDARDClassifier, L1LogisticRegression, RVMRegressor, RVMClassifier]
)
def test_no_option_of_an_estimator_is_left_out(kind: Any) -> None:
    assert set(kind().get_params()) == set(OPTIONS[kind.__name__])


@every_option
def test_what_an_option_cannot_be_is_refused_by_its_name(subject: str, option: str) -> None:
    words = WORDS.get(option, rf"\b{option}\b.* must|\b{option} must")
    for value in OPTIONS[subject][option][0]:
        with pytest.raises((ValueError, TypeError), match=words) as caught:
            SUBJECTS[subject](**{option: value})
        assert repr(value) in str(caught.value) or str(value) in str(caught.value), value


@every_option
def test_numpys_numbers_are_numbers(subject: str, option: str) -> None:
    for value in OPTIONS[subject][option][1]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            SUBJECTS[subject](**{option: value})


def test_a_path_needs_a_list() -> None:
    for value in (1.0, None, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=r"Cs must be a list of numbers; got .*try \[C\]"):
            l1_logistic_path(X_TORCH, LABELS_TORCH, value)


@pytest.mark.parametrize("value", [True, "a", NAN, 0.0, [1.0]])
def test_what_a_grid_cannot_hold_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"C must be a positive, finite number; got ") as caught:
        cross_validate_l1(X_TORCH, LABELS_TORCH, Cs=[1.0, value])
    assert repr(value) in str(caught.value)
