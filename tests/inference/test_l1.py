"""L1 logistic regression beside scikit-learn, mpmath, autograd and its optimality conditions."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.svm import l1_min_c as sklearn_min_c

from bayes_svdo.inference import l1
from bayes_svdo.inference.l1 import fit_l1_logistic, l1_logistic_path, l1_min_c


@pytest.fixture
def data(correlated):
    """A function that makes features and labels, by name."""

    def make(name):
        if name == "digits 3 or 8":
            x, y = load_digits(return_X_y=True)
            kept = (y == 3) | (y == 8)
            return x[kept] / 16.0, (y[kept] == 8).astype(int)
        if name == "digits 0 to 3":
            x, y = load_digits(return_X_y=True)
            kept = (y < 4).nonzero()[0][:300]
            return x[kept] / 16.0, y[kept]
        if name == "breast cancer":
            x, y = load_breast_cancer(return_X_y=True)
            return StandardScaler().fit_transform(x), y
        if name == "correlated":
            return correlated(200, 20, 2)
        if name == "correlated, 3 classes":
            return correlated(200, 15, 3)
        if name == "more features than samples":
            return make_classification(60, 300, n_informative=10, random_state=0)
        assert name == "more features than samples, 3 classes"
        return correlated(40, 120, 3)

    return make


BINARY = ["digits 3 or 8", "breast cancer", "correlated", "more features than samples"]
MULTINOMIAL = ["digits 0 to 3", "correlated, 3 classes", "more features than samples, 3 classes"]


def _tensors(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(x), torch.as_tensor(y)


def _objective(x: np.ndarray, y: np.ndarray, coef: object, intercept: object, C: float) -> float:
    """The objective as scikit-learn writes it, from features and weights as the user has them."""
    coef, intercept = np.asarray(coef), np.asarray(intercept)
    logits = x @ coef.T + intercept
    if len(coef) == 1:
        logits = np.hstack([np.zeros_like(logits), logits])
    loss = logsumexp(logits, axis=1) - logits[np.arange(len(y)), y]
    return float(C * loss.sum() + np.abs(coef).sum())


# --- beside scikit-learn -------------------------------------------------------------------------


@pytest.mark.parametrize("C", [0.05, 1.0])
@pytest.mark.parametrize("name", BINARY)
def test_objective_without_intercept_equals_liblinear(name, C, data):
    x, y = data(name)
    # liblinear penalises its intercept, so only without one are the problems the same.
    theirs = LogisticRegression(
        l1_ratio=1, C=C, solver="liblinear", fit_intercept=False, tol=1e-7, max_iter=5000
    ).fit(x, y)
    fit = fit_l1_logistic(*_tensors(x, y), C=C, fit_intercept=False)
    assert fit.converged
    assert fit.objective == pytest.approx(_objective(x, y, fit.coef, 0.0, C), rel=1e-12)
    assert fit.objective == pytest.approx(_objective(x, y, theirs.coef_, 0.0, C), rel=1e-6)
    assert (fit.intercept == 0.0).all()


# saga takes too long on the breast cancer data; liblinear covers it above.
@pytest.mark.parametrize("name", [name for name in BINARY if name != "breast cancer"] + MULTINOMIAL)
def test_objective_with_intercept_equals_saga(name, data):
    x, y = data(name)
    C = 0.2
    # saga shuffles, hence the seed. This tolerance was seen to leave it 7e-8 above the minimum.
    theirs = LogisticRegression(
        l1_ratio=1, C=C, solver="saga", tol=1e-5, max_iter=5000, random_state=0
    ).fit(x, y)
    fit = fit_l1_logistic(*_tensors(x, y), C=C)
    assert fit.converged
    assert fit.objective == pytest.approx(_objective(x, y, fit.coef, fit.intercept, C), rel=1e-12)
    reference = _objective(x, y, theirs.coef_, theirs.intercept_, C)
    assert fit.objective == pytest.approx(reference, rel=1e-6)
    assert fit.coef.shape == theirs.coef_.shape
    assert fit.intercept.shape == theirs.intercept_.shape
    probs = fit.log_probabilities(torch.as_tensor(x)).exp()
    # The optimum is flat: a relative excess of 1e-6 moves a probability by its square root.
    np.testing.assert_allclose(probs, theirs.predict_proba(x), atol=2e-3)


def test_smallest_C_equals_scikit_learns_where_that_does_not_penalise_an_intercept(data):
    x, y = data("breast cancer")
    expected = sklearn_min_c(x, y, loss="log", fit_intercept=False)
    assert l1_min_c(*_tensors(x, y), fit_intercept=False) == pytest.approx(expected, rel=1e-12)


# --- optimality ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["newton", "fista"])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_solution_meets_the_optimality_conditions(num_classes, fit_intercept, solver, noisy):
    x, y = noisy(num_classes)
    C = 0.5
    fit = fit_l1_logistic(x, y, C=C, fit_intercept=fit_intercept, tol=1e-13, solver=solver)
    coef = fit.coef.clone().requires_grad_()
    intercept = fit.intercept.clone().requires_grad_()
    logits = x @ coef.T + intercept
    if num_classes == 2:
        logits = torch.cat([torch.zeros_like(logits), logits], 1)
    loss = C * torch.nn.functional.cross_entropy(logits, y, reduction="sum")
    slope, slope_intercept = torch.autograd.grad(loss, [coef, intercept])
    # A gap of 1e-13 of the objective leaves slopes off by its square root, about 1e-6.
    support = fit.coef != 0.0
    assert 0 < support.sum() < support.numel()
    torch.testing.assert_close(slope[support], -fit.coef[support].sign(), rtol=0.0, atol=2e-5)
    assert slope[~support].abs().max() < 1.0 + 2e-5
    if fit_intercept:
        assert slope_intercept.abs().max() < 2e-5


def test_separable_classes_at_a_large_C_converge(data):
    x, y = _tensors(*data("more features than samples"))
    fit = fit_l1_logistic(x, y, C=1e4)
    assert fit.converged
    assert (fit.predict(x) == y).all()


def test_collinear_features_take_no_more_steps_than_others():
    """Features in their own units, none centred: condition number 1e12."""
    x, y = load_breast_cancer(return_X_y=True)
    fit = fit_l1_logistic(*_tensors(x, y), fit_intercept=False)
    assert fit.converged
    assert fit.n_iter <= 15  # 10 where this was written; 35 with a coarser search of the signs


# --- invariances ---------------------------------------------------------------------------------


def test_an_offset_of_the_features_moves_the_intercept_alone(noisy):
    x, y = noisy(3)
    offset = torch.linspace(-1e4, 1e4, x.shape[1], dtype=torch.float64)
    near, far = (fit_l1_logistic(a, y, C=0.5, tol=1e-12) for a in (x, x + offset))
    # x + 1e4 rounds x to 1e-12.
    torch.testing.assert_close(near.coef, far.coef, rtol=1e-6, atol=1e-6)
    moved = near.intercept - near.coef @ offset
    torch.testing.assert_close(far.intercept, moved - moved.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-150, 1e150])
def test_units_of_the_features_and_C_trade_off(factor, noisy):
    """``C L(w x) + |w|`` with x in other units is the same problem at another C, rescaled."""
    x, y = noisy(2)
    fit = fit_l1_logistic(x, y, C=0.5, tol=1e-10)
    other = fit_l1_logistic(factor * x, y, C=0.5 / factor, tol=1e-10)
    torch.testing.assert_close(other.coef * factor, fit.coef, rtol=1e-8, atol=1e-12)
    assert other.objective * factor == pytest.approx(fit.objective, rel=1e-9)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("factor", [1e-30, 1e-16, 1e16, 1e30, 1e150])
def test_units_of_the_features_act_as_C_does(factor, num_classes, noisy):
    """``C L(w x) + |w|`` of ``s x`` is, in ``v = s w``, the problem of ``x`` at ``s C``, over s."""
    x, y = noisy(num_classes)
    fit, other = (fit_l1_logistic(a, y, C=c) for a, c in ((factor * x, 0.5), (x, 0.5 * factor)))
    assert fit.converged
    assert other.converged
    assert fit.objective * factor == pytest.approx(other.objective, rel=2e-6)
    torch.testing.assert_close(fit.coef * factor, other.coef, rtol=1e-5, atol=1e-5)
    if factor < 1:
        assert not fit.coef.any()


@pytest.mark.parametrize("solver", ["newton", "fista"])
def test_a_penalty_that_is_lost_in_rounding_leaves_maximum_likelihood(solver, noisy):
    x, y = noisy(2)
    fit = fit_l1_logistic(1e30 * x, y, solver=solver, tol=1e-8)
    assert fit.converged
    theirs = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(x.numpy(), y.numpy())
    np.testing.assert_allclose(1e30 * fit.coef, theirs.coef_, rtol=1e-2, atol=1e-3)
    least = theirs.decision_function(x.numpy()) * (2 * y.numpy() - 1)
    assert fit.objective == pytest.approx(np.log1p(np.exp(-least)).sum(), rel=1e-7)


def test_classes_that_are_apart_have_no_minimum_without_a_penalty_and_are_no_false_success():
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
    with pytest.warns(ConvergenceWarning, match="duality gap"):
        fit = fit_l1_logistic(1e30 * x, (x[:, 0] > 0).long())
    assert not fit.converged


def test_integer_sample_weights_are_repetitions(noisy):
    x, y = noisy(3)
    counts = torch.arange(len(x)) % 3
    counts[:3] = 1
    weighted = fit_l1_logistic(x, y, C=0.3, sample_weight=counts, tol=1e-12)
    repeated = fit_l1_logistic(
        x.repeat_interleave(counts, 0), y.repeat_interleave(counts), C=0.3, tol=1e-12
    )
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-11)
    torch.testing.assert_close(weighted.coef, repeated.coef, rtol=1e-5, atol=1e-5)


def test_a_constant_feature_gets_no_weight_and_changes_nothing(noisy):
    x, y = noisy(2)
    constant = torch.full_like(x[:, :1], 0.1)
    fit = fit_l1_logistic(torch.cat([x, constant], 1), y, C=0.5)
    assert fit.coef[0, -1] == 0.0
    assert fit.objective == pytest.approx(fit_l1_logistic(x, y, C=0.5).objective, rel=2e-6)


def test_a_constant_feature_serves_as_a_penalised_intercept_where_none_is_fitted(data):
    x, y = data("breast cancer")
    x, y = x[y == 1][:, :3].repeat(2, 0), np.repeat([0, 1], (y == 1).sum())
    y[: len(y) // 4] = 1
    theirs = LogisticRegression(
        l1_ratio=1, solver="liblinear", fit_intercept=True, tol=1e-9, max_iter=5000
    ).fit(x, y)
    ones = np.hstack([x, np.ones((len(x), 1))])
    fit = fit_l1_logistic(*_tensors(ones, y), fit_intercept=False)
    reference = _objective(ones, y, np.c_[theirs.coef_, theirs.intercept_], 0.0, 1.0)
    assert fit.objective == pytest.approx(reference, rel=1e-6)
    assert fit.coef[0, -1] != 0.0


@pytest.mark.parametrize("num_classes", [2, 3])
def test_duplicate_columns_leave_the_minimum_as_it_is(num_classes, noisy):
    x, y = noisy(num_classes)
    once = fit_l1_logistic(x, y, C=2.0, tol=1e-9)
    twice = fit_l1_logistic(torch.cat([x, x], 1), y, C=2.0, tol=1e-9)
    assert twice.objective == pytest.approx(once.objective, rel=2e-9)


def test_layout_and_gradients_of_the_inputs_do_not_matter(noisy):
    x, y = noisy(2)
    expected = fit_l1_logistic(x, y, C=0.5)
    wide = torch.stack([x, x], 2).flatten(1)[:, ::2].requires_grad_()
    assert not wide.is_contiguous()
    before = wide.detach().clone()
    fit = fit_l1_logistic(wide, torch.stack([y, y], 1)[:, 0].int(), C=0.5)
    torch.testing.assert_close(fit.coef, expected.coef)
    assert not fit.coef.requires_grad
    assert torch.equal(wide, before)


def test_float32_keeps_its_dtype_and_meets_its_tolerance(data):
    x, y = _tensors(*data("digits 0 to 3"))
    double = fit_l1_logistic(x, y, C=0.5)
    single = fit_l1_logistic(x.float(), y, C=0.5)
    assert single.coef.dtype == single.intercept.dtype == torch.float32
    assert single.converged
    assert single.relative_gap <= 1e-4
    assert single.objective == pytest.approx(double.objective, rel=2e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("solver", ["newton", "fista"])
def test_cuda_and_cpu_agree(solver, data):
    x, y = _tensors(*data("digits 0 to 3"))
    here = fit_l1_logistic(x, y, C=0.5, solver=solver)
    there = fit_l1_logistic(x.cuda(), y.cuda(), C=0.5, solver=solver)
    assert there.coef.is_cuda
    assert there.classes.is_cuda
    assert there.objective == pytest.approx(here.objective, rel=2e-6)


# --- path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_smallest_C_is_where_the_first_weight_appears(num_classes, fit_intercept, noisy):
    x, y = noisy(num_classes)
    weights = torch.linspace(0.5, 2.0, len(x))
    options = {"fit_intercept": fit_intercept, "sample_weight": weights}
    bound = l1_min_c(x, y, **options)
    below, above = l1_logistic_path(x, y, [bound * (1 - 1e-9), bound * 1.001], tol=1e-9, **options)
    assert below.sparsity == 1.0
    assert below.n_iter == 0
    assert above.coef.count_nonzero() >= 1


def test_smallest_C_is_infinite_where_no_feature_varies(noisy):
    _, y = noisy(3)
    assert l1_min_c(torch.full((len(y), 2), 0.3, dtype=torch.float64), y) == math.inf
    assert l1_min_c(torch.empty(len(y), 0, dtype=torch.float64), y) == math.inf


def test_path_keeps_the_order_of_its_grid_and_equals_cold_fits(data):
    x, y = _tensors(*data("digits 0 to 3"))
    grid = torch.tensor([1.0, 0.03, 0.2])
    path = l1_logistic_path(x, y, grid)
    assert [fit.C for fit in path] == grid.tolist()
    for fit in path:
        cold = fit_l1_logistic(x, y, C=fit.C)
        assert fit.objective == pytest.approx(cold.objective, rel=2e-6)
    assert path[0].sparsity < path[2].sparsity < path[1].sparsity


def test_a_start_at_the_solution_takes_no_step(data):
    x, y = _tensors(*data("correlated, 3 classes"))
    fit = fit_l1_logistic(x, y, C=0.4, tol=1e-8)
    again = fit_l1_logistic(x, y, C=0.4, tol=1e-7, init=fit)
    assert fit.n_iter > 0
    assert again.n_iter == 0
    assert again.objective == pytest.approx(fit.objective, rel=1e-12)


def test_a_start_with_a_weight_on_a_constant_feature_loses_it(noisy):
    x, y = noisy(2)
    fit = fit_l1_logistic(x, y, C=0.4)
    flat = x.clone()
    flat[:, 0] = 3.0
    again = fit_l1_logistic(flat, y, C=0.4, init=fit)
    assert fit.coef[0, 0] != 0.0
    assert again.coef[0, 0] == 0.0
    assert again.converged


def test_sparsity_counts_exact_zeros(noisy):
    x, y = noisy(2)
    fit = fit_l1_logistic(x, y, C=0.1)
    assert fit.sparsity == pytest.approx(float((fit.coef == 0.0).double().mean()))
    assert 0.0 < fit.sparsity < 1.0


def test_no_features_leave_the_frequencies_of_the_classes(noisy):
    _, y = noisy(3)
    fit = fit_l1_logistic(torch.empty(len(y), 0, dtype=torch.float64), y)
    share = torch.bincount(y) / len(y)
    assert fit.coef.shape == (3, 0)
    assert fit.sparsity == 1.0
    probs = fit.log_probabilities(torch.empty(1, 0, dtype=torch.float64)).exp()[0]
    torch.testing.assert_close(probs, share.double(), rtol=1e-6, atol=1e-6)
    none = fit_l1_logistic(torch.empty(len(y), 0, dtype=torch.float64), y, fit_intercept=False)
    assert none.objective == pytest.approx(len(y) * math.log(3.0))


def test_two_samples_are_enough():
    x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    fit = fit_l1_logistic(x, torch.tensor([0, 1]), C=2.0, tol=1e-12)
    # By symmetry the intercept is zero and the weight solves 2 C sigmoid(-w) = 1.
    assert float(fit.coef[0, 0]) == pytest.approx(math.log(3.0), abs=1e-5)
    assert float(fit.intercept[0]) == pytest.approx(0.0, abs=1e-8)


def test_the_docstrings_examples_run():
    assert doctest.testmod(l1) == doctest.TestResults(failed=0, attempted=2)


# --- outcomes and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["newton", "fista"])
def test_too_few_steps_warn_with_the_remaining_gap(solver, noisy):
    x, y = noisy(3)
    with pytest.warns(ConvergenceWarning, match=r"C=1 stopped after 1 steps.*gap of .*max_iter"):
        fit = fit_l1_logistic(x, y, max_iter=1, solver=solver)
    assert not fit.converged
    assert fit.relative_gap > 1e-6


def test_a_tolerance_below_rounding_stops_and_says_so(data):
    x, y = _tensors(*data("correlated"))
    with pytest.warns(ConvergenceWarning, match=r"Rounding in torch.float32.*x.double\(\)"):
        fit = fit_l1_logistic(x.float(), y, C=0.5, tol=1e-12)
    assert fit.n_iter < 1000
    assert fit.relative_gap < 1e-5
