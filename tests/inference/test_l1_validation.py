"""What L1 logistic regression refuses."""

from __future__ import annotations

import math

import pytest
import torch

from bayes_svdo.inference.l1 import fit_l1_logistic, l1_logistic_path, l1_min_c

Y = torch.arange(60) % 3
X = torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
NAN = X.clone()
NAN[2, 1] = math.nan
INF = X.clone()
INF[0, 0] = math.inf


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "words"),
    [
        (NAN, Y, {}, ValueError, r"x must be finite; 1 of its 480"),
        (INF, Y, {}, ValueError, r"x must be finite; 1 of its 480"),
        (X.long(), Y, {}, TypeError, r"float32 or float64.*torch.int64.*x.double\(\)"),
        (X.half(), Y, {}, TypeError, r"float32 or float64.*torch.float16"),
        (X.numpy(), Y, {}, TypeError, r"float32 or float64 tensor; got ndarray"),
        (X.to_sparse(), Y, {}, TypeError, r"dense.*to_dense"),
        (X[0], Y, {}, ValueError, r"\(samples, features\); got shape \(8,\)"),
        (X, Y.double(), {}, TypeError, r"y must be an integer.*float64.*y.long\(\)"),
        (X, Y.tolist(), {}, TypeError, r"y must be an integer.*list"),
        (X, Y[:-1], {}, ValueError, r"y must be \(60,\).*\(59,\)"),
        (X, Y[:, None], {}, ValueError, r"y must be \(60,\).*\(60, 1\)"),
        (X, Y - 1, {}, ValueError, r"class indices 0 .. K - 1; got -1"),
        (X, Y * 0, {}, ValueError, r"at least two classes.*got one, 0, in 60 samples"),
        (X[:1], Y[:1], {}, ValueError, r"at least two classes"),
        (X[:0], Y[:0], {}, ValueError, r"at least one sample"),
        (X, Y * 2, {}, ValueError, r"from 0 to 4.*class 1 has none.*\n.*torch.unique"),
        (X, Y, {"C": 0.0}, ValueError, r"C must be a positive, finite number; got 0.0"),
        (X, Y, {"C": -1.0}, ValueError, r"C must be a positive.*got -1.0"),
        (X, Y, {"C": math.inf}, ValueError, r"C must be a positive.*got inf.*large C"),
        (X, Y, {"C": math.nan}, ValueError, r"C must be a positive.*got nan"),
        (X, Y, {"C": "1"}, ValueError, r"C must be a positive.*got '1'"),
        (X, Y, {"tol": 0.0}, ValueError, r"tol must be a positive number, but is 0.0"),
        (X, Y, {"max_iter": 0}, ValueError, r"max_iter must be an integer of at least 1, but is 0"),
        (
            X,
            Y,
            {"fit_intercept": "no"},
            TypeError,
            r"fit_intercept must be True or False, got 'no'",
        ),
        (X, Y, {"solver": "saga"}, ValueError, r'"auto", "newton" or "fista"; got \'saga\''),
        (X, Y, {"sample_weight": X[:, 0]}, ValueError, r"not negative; got values from -"),
        (X, Y, {"sample_weight": X[:3, 0]}, ValueError, r"shape \(60,\); got torch.Size\(\[3\]\)"),
        (X, Y, {"sample_weight": 2.0}, ValueError, r"shape \(60,\); got float"),
        (X, Y, {"sample_weight": (Y != 1).int()}, ValueError, r"class 1 has none"),
        (X, Y.to("meta"), {}, ValueError, r"y is on meta but x is on cpu"),
        (X, Y, {"sample_weight": X[:, 0].to("meta")}, ValueError, r"on meta but x is on cpu"),
    ],
)
def test_bad_input_is_refused_by_name(x, y, options, error, words):
    with pytest.raises(error, match=words):
        fit_l1_logistic(x, y, **options)


def test_the_smallest_C_refuses_the_same_intercepts():
    with pytest.raises(TypeError, match="fit_intercept must be True or False, got None"):
        l1_min_c(X, Y, fit_intercept=None)


def test_an_empty_grid_a_misshapen_start_and_wrong_features_are_refused():
    with pytest.raises(ValueError, match="Cs must hold at least one value"):
        l1_logistic_path(X, Y, [])
    fit = fit_l1_logistic(X, Y)
    with pytest.raises(ValueError, match=r"init.coef must be \(3, 7\).*\(3, 8\)"):
        fit_l1_logistic(X[:, 1:], Y, init=fit)
    with pytest.raises(ValueError, match=r"x must be \(n, 8\).*\(60, 7\)"):
        fit.predict(X[:, 1:])
