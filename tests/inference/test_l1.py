"""L1 logistic regression beside scikit-learn, mpmath, autograd and its optimality conditions."""

from __future__ import annotations

import doctest
import math

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.datasets import load_breast_cancer, load_digits, make_classification
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from sklearn.svm import l1_min_c as sklearn_min_c

from bayes_svdo.inference import l1
from bayes_svdo.inference.l1 import fit_l1_logistic, l1_logistic_path, l1_min_c
from bayes_svdo.inference.l1_cross_validation import cross_validate_l1
from bayes_svdo.inference.l1_losses import BinaryLoss, MultinomialLoss
from bayes_svdo.inference.l1_newton import (
    break_points,
    minimise_quadratic,
    newton_step,
    working_set,
)
from bayes_svdo.inference.l1_problem import standardised_problem
from bayes_svdo.inference.l1_solver import minimise


def _correlated(n: int, p: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features that share two factors, so that their correlations are near 0.7."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p)) + rng.normal(size=(n, 2)) @ rng.normal(size=(2, p))
    coef = np.zeros((num_classes, p))
    coef[:, :5] = rng.normal(size=(num_classes, 5))
    y = (x @ coef.T + rng.gumbel(size=(n, num_classes))).argmax(1)
    return x, y


def _data(name: str) -> tuple[np.ndarray, np.ndarray]:
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
        return _correlated(200, 20, 2)
    if name == "correlated, 3 classes":
        return _correlated(200, 15, 3)
    if name == "more features than samples":
        return make_classification(60, 300, n_informative=10, random_state=0)
    assert name == "more features than samples, 3 classes"
    return _correlated(40, 120, 3)


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


def _noisy(num_classes: int, n: int = 60, p: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    x = torch.randn(n, p, generator=generator, dtype=torch.float64)
    y = torch.randint(num_classes, (n,), generator=generator)
    y[:num_classes] = torch.arange(num_classes)
    x[:, 0] += y
    return x, y


# --- beside scikit-learn -------------------------------------------------------------------------


@pytest.mark.parametrize("C", [0.05, 1.0])
@pytest.mark.parametrize("name", BINARY)
def test_objective_without_intercept_equals_liblinear(name, C):
    x, y = _data(name)
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
def test_objective_with_intercept_equals_saga(name):
    x, y = _data(name)
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


def test_smallest_C_equals_scikit_learns_where_that_does_not_penalise_an_intercept():
    x, y = _data("breast cancer")
    expected = sklearn_min_c(x, y, loss="log", fit_intercept=False)
    assert l1_min_c(*_tensors(x, y), fit_intercept=False) == pytest.approx(expected, rel=1e-12)


# --- optimality ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["newton", "fista"])
@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("num_classes", [2, 4])
def test_solution_meets_the_optimality_conditions(num_classes, fit_intercept, solver):
    x, y = _noisy(num_classes)
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


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_duality_gap_bounds_the_excess_at_any_point(num_classes, fit_intercept):
    x, y = _noisy(num_classes)
    scale = 0.3 * torch.linspace(0.5, 1.5, len(x), dtype=torch.float64)
    problem = standardised_problem(x, y, scale, num_classes, fit_intercept)
    best = minimise(problem, problem.null_weight(), tol=1e-12, max_iter=100)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(best.weight.shape, generator=generator, dtype=torch.float64)
    points = [size * noise for size in (0.0, 1e-3, 0.1, 1.0, 30.0)]
    points += [best.weight + size * noise for size in (1e-6, 1e-3, 0.1)]
    if fit_intercept:  # a dual point that forgets the intercept's constraint claims too much here
        shift = torch.zeros_like(noise)
        shift[:, -1] = noise[:, -1]
        points += [best.weight + size * shift for size in (1e-4, 1e-2, 1.0)]
    for weight in points:
        point = problem.evaluate(weight)
        assert point.gap >= point.value - best.point.value - 1e-10
    null = problem.with_scale(1e-4 * scale)
    assert null.evaluate(null.null_weight()).gap == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_balanced_residuals_sum_to_zero(num_classes):
    x, y = _noisy(num_classes)
    problem = standardised_problem(x, y, torch.ones_like(x[:, 0]), num_classes, True)
    logits = torch.randn(problem.loss.target.shape, generator=torch.Generator().manual_seed(0))
    probs = problem.loss.probabilities(logits.double())
    alpha = problem.loss.balance(probs)
    assert alpha.min() > 0.0
    assert alpha.max() == 1.0
    assert (alpha * (probs - problem.loss.target)).sum(1).abs().max() < 1e-12


def test_newton_and_fista_find_the_same_minimum():
    x, y = _tensors(*_data("correlated, 3 classes"))
    newton = fit_l1_logistic(x, y, C=0.5, tol=1e-10, solver="newton")
    fista = fit_l1_logistic(x, y, C=0.5, tol=1e-10, solver="fista")
    assert newton.objective == pytest.approx(fista.objective, rel=2e-10)
    assert torch.equal(newton.coef == 0.0, fista.coef == 0.0)
    assert newton.n_iter < 20 < fista.n_iter


def test_fista_hands_over_to_newton_when_its_system_has_become_affordable(monkeypatch):
    x, y = _tensors(*_data("correlated, 3 classes"))
    alone = fit_l1_logistic(x, y, C=0.3, tol=1e-9, solver="fista")
    held = int(alone.coef.count_nonzero()) + 3
    monkeypatch.setattr("bayes_svdo.inference.l1_solver._LARGEST_SYSTEM", held + 1)
    both = fit_l1_logistic(x, y, C=0.3, tol=1e-9)
    assert held + 1 < alone.coef.numel()
    assert both.objective == pytest.approx(alone.objective, rel=2e-9)
    assert both.n_iter < alone.n_iter


def test_separable_classes_at_a_large_C_converge():
    x, y = _tensors(*_data("more features than samples"))
    fit = fit_l1_logistic(x, y, C=1e4)
    assert fit.converged
    assert (fit.predict(x) == y).all()


def test_collinear_features_take_no_more_steps_than_others():
    """Features in their own units, none centred: condition number 1e12."""
    x, y = load_breast_cancer(return_X_y=True)
    fit = fit_l1_logistic(*_tensors(x, y), fit_intercept=False)
    assert fit.converged
    assert fit.n_iter <= 15  # 10 where this was written; 35 with a coarser search of the signs


def test_break_points_keep_the_first_and_the_full_step():
    limits = torch.linspace(2.0, 0.002, 1000, dtype=torch.float64)
    steps = break_points(limits)
    assert len(steps) == 24
    assert steps[0] == limits.min()
    assert steps[-1] == 1.0
    assert (steps.diff() >= 0.0).all()
    few = break_points(torch.tensor([math.inf, 0.5, 3.0, 0.1]))
    assert few.tolist() == pytest.approx([0.1, 0.5, 1.0])


def test_no_step_is_taken_where_nothing_wants_to_move():
    x, y = _noisy(3)
    problem = standardised_problem(x, y, torch.full_like(x[:, 0], 1e-6), 3, False)
    weight = problem.null_weight()
    point = problem.evaluate(weight)
    for mask in (torch.zeros_like(weight, dtype=torch.bool), torch.ones_like(weight).bool()):
        assert newton_step(problem, weight, point, mask) is None


def test_quadratic_that_rounding_made_indefinite_is_still_lowered():
    hessian = torch.diag(torch.tensor([1.0, -1e-6, 0.5], dtype=torch.float64))
    gradient = torch.tensor([3.0, 2.0, -4.0], dtype=torch.float64)
    start, penalty = torch.zeros_like(gradient), torch.ones_like(gradient)
    point = minimise_quadratic(hessian, gradient, start, penalty)
    assert torch.isfinite(point).all()
    value = gradient @ point + 0.5 * point @ hessian @ point + penalty @ point.abs()
    assert value < -10.0  # the two sound weights alone reach -2 - 9


def test_working_set_is_exact_in_size_among_duplicate_columns():
    x, y = _noisy(2, p=3)
    problem = standardised_problem(x.repeat(1, 200), y, torch.ones_like(x[:, 0]), 2, True)
    weight = problem.null_weight()
    mask = working_set(problem, weight, problem.evaluate(weight), limit=1000)
    assert mask.sum() == 101  # the intercept and the 100 that may always be added


# --- losses --------------------------------------------------------------------------------------


def _loss(num_classes: int, n: int = 12) -> tuple[BinaryLoss | MultinomialLoss, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(n) % num_classes
    scale = 0.5 + torch.rand(n, generator=generator, dtype=torch.float64)
    rows = 1 if num_classes == 2 else num_classes
    logits = 3.0 * torch.randn(rows, n, generator=generator, dtype=torch.float64)
    if num_classes == 2:
        return BinaryLoss(labels, labels[None].double(), scale), logits
    target = torch.nn.functional.one_hot(labels, num_classes).T.double()
    return MultinomialLoss(labels, target, scale), logits


@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.5, 4.0, 900.0])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_bregman_distance_equals_mpmath(num_classes, size):
    loss, logits = _loss(num_classes)
    step = size * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).double()
    probs = loss.probabilities(logits)

    def partition(column: list[mpmath.mpf]) -> mpmath.mpf:
        return mpmath.log(mpmath.fsum(mpmath.exp(z) for z in column))

    expected = mpmath.mpf(0)
    with mpmath.workdps(60):
        for i in range(logits.shape[1]):
            zero = [mpmath.mpf(0)] if num_classes == 2 else []
            before = zero + [mpmath.mpf(float(z)) for z in logits[:, i]]
            move = zero + [mpmath.mpf(float(d)) for d in step[:, i]]
            total = mpmath.fsum(mpmath.exp(z) for z in before)
            mean = mpmath.fsum(mpmath.exp(z) / total * d for z, d in zip(before, move, strict=True))
            after = [z + d for z, d in zip(before, move, strict=True)]
            expected += float(loss.scale[i]) * (partition(after) - partition(before) - mean)
    # Rounding of the centred step is eps in size and its square is the distance: eps / size.
    assert float(loss.bregman(logits, probs, step)) == pytest.approx(
        float(expected), rel=max(1e-13, 1e-14 / size), abs=0.0
    )


def test_binary_loss_is_exact_where_softplus_rounds():
    loss, logits = _loss(2)
    far = torch.full_like(logits, 25.0)
    wrong = 1.0 - loss.target
    expected = (loss.scale * (wrong * 25.0 + math.log1p(math.exp(-25.0)))).sum()
    assert float(loss.value(far)) == pytest.approx(float(expected), rel=1e-15)
    right = BinaryLoss(loss.labels, torch.ones_like(loss.target), loss.scale)
    tail = float(loss.scale.sum()) * math.log1p(math.exp(-25.0))
    assert float(right.value(far)) == pytest.approx(tail, rel=1e-12, abs=0.0)


@pytest.mark.parametrize("chunk", [2**24, 40])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_hessian_equals_autograd(num_classes, chunk, monkeypatch):
    monkeypatch.setattr("bayes_svdo.inference.l1_losses._CHUNK", chunk)
    loss, logits = _loss(num_classes)
    generator = torch.Generator().manual_seed(3)
    design = torch.randn(4, logits.shape[1], generator=generator, dtype=torch.float64)
    weight = torch.randn(len(logits), 4, generator=generator, dtype=torch.float64)
    full = torch.autograd.functional.hessian(lambda w: loss.value(w @ design), weight)
    mask = torch.rand(weight.shape, generator=generator) < 0.7
    classes, features = mask.nonzero(as_tuple=True)
    probs = loss.probabilities(weight @ design)
    ours = loss.hessian(design, probs, classes, features)
    theirs = full[classes, features][:, classes, features]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rank", [12, 5], ids=["definite", "singular"])
def test_quadratic_is_minimised_to_its_optimality_conditions(rank):
    generator = torch.Generator().manual_seed(rank)
    root = torch.randn(12, rank, generator=generator, dtype=torch.float64)
    hessian, gradient = root @ root.T, 5.0 * root.sum(1)
    penalty = torch.ones(12, dtype=torch.float64)
    penalty[-1] = 0.0
    point = torch.randn(12, generator=generator, dtype=torch.float64)
    start = point
    previous = math.inf
    for _ in range(20):
        move = point - start
        slope = gradient + hessian @ move
        value = float(gradient @ move + 0.5 * move @ hessian @ move + penalty @ point.abs())
        assert value <= previous + 1e-12
        previous = value
        point = minimise_quadratic(hessian, slope, point, penalty)
    slope = gradient + hessian @ (point - start)
    held = point != 0.0
    assert (slope + penalty * point.sign())[held].abs().max() < 1e-7
    assert (slope.abs() - penalty)[~held].max() < 1e-7


# --- invariances ---------------------------------------------------------------------------------


def test_an_offset_of_the_features_moves_the_intercept_alone():
    x, y = _noisy(3)
    offset = torch.linspace(-1e4, 1e4, x.shape[1], dtype=torch.float64)
    near, far = (fit_l1_logistic(a, y, C=0.5, tol=1e-12) for a in (x, x + offset))
    # x + 1e4 rounds x to 1e-12.
    torch.testing.assert_close(near.coef, far.coef, rtol=1e-6, atol=1e-6)
    moved = near.intercept - near.coef @ offset
    torch.testing.assert_close(far.intercept, moved - moved.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-150, 1e150])
def test_units_of_the_features_and_C_trade_off(factor):
    """``C L(w x) + |w|`` with x in other units is the same problem at another C, rescaled."""
    x, y = _noisy(2)
    fit = fit_l1_logistic(x, y, C=0.5, tol=1e-10)
    other = fit_l1_logistic(factor * x, y, C=0.5 / factor, tol=1e-10)
    torch.testing.assert_close(other.coef * factor, fit.coef, rtol=1e-8, atol=1e-12)
    assert other.objective * factor == pytest.approx(fit.objective, rel=1e-9)


def test_integer_sample_weights_are_repetitions():
    x, y = _noisy(3)
    counts = torch.arange(len(x)) % 3
    counts[:3] = 1
    weighted = fit_l1_logistic(x, y, C=0.3, sample_weight=counts, tol=1e-12)
    repeated = fit_l1_logistic(
        x.repeat_interleave(counts, 0), y.repeat_interleave(counts), C=0.3, tol=1e-12
    )
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-11)
    torch.testing.assert_close(weighted.coef, repeated.coef, rtol=1e-5, atol=1e-5)


def test_a_constant_feature_gets_no_weight_and_changes_nothing():
    x, y = _noisy(2)
    constant = torch.full_like(x[:, :1], 0.1)
    fit = fit_l1_logistic(torch.cat([x, constant], 1), y, C=0.5)
    assert fit.coef[0, -1] == 0.0
    assert fit.objective == pytest.approx(fit_l1_logistic(x, y, C=0.5).objective, rel=2e-6)


def test_a_constant_feature_serves_as_a_penalised_intercept_where_none_is_fitted():
    x, y = _data("breast cancer")
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
def test_duplicate_columns_leave_the_minimum_as_it_is(num_classes):
    x, y = _noisy(num_classes)
    once = fit_l1_logistic(x, y, C=2.0, tol=1e-9)
    twice = fit_l1_logistic(torch.cat([x, x], 1), y, C=2.0, tol=1e-9)
    assert twice.objective == pytest.approx(once.objective, rel=2e-9)


def test_layout_and_gradients_of_the_inputs_do_not_matter():
    x, y = _noisy(2)
    expected = fit_l1_logistic(x, y, C=0.5)
    wide = torch.stack([x, x], 2).flatten(1)[:, ::2].requires_grad_()
    assert not wide.is_contiguous()
    before = wide.detach().clone()
    fit = fit_l1_logistic(wide, torch.stack([y, y], 1)[:, 0].int(), C=0.5)
    torch.testing.assert_close(fit.coef, expected.coef)
    assert not fit.coef.requires_grad
    assert torch.equal(wide, before)


def test_float32_keeps_its_dtype_and_meets_its_tolerance():
    x, y = _tensors(*_data("digits 0 to 3"))
    double = fit_l1_logistic(x, y, C=0.5)
    single = fit_l1_logistic(x.float(), y, C=0.5)
    assert single.coef.dtype == single.intercept.dtype == torch.float32
    assert single.converged
    assert single.relative_gap <= 1e-4
    assert single.objective == pytest.approx(double.objective, rel=2e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("solver", ["newton", "fista"])
def test_cuda_and_cpu_agree(solver):
    x, y = _tensors(*_data("digits 0 to 3"))
    here = fit_l1_logistic(x, y, C=0.5, solver=solver)
    there = fit_l1_logistic(x.cuda(), y.cuda(), C=0.5, solver=solver)
    assert there.coef.is_cuda
    assert there.classes.is_cuda
    assert there.objective == pytest.approx(here.objective, rel=2e-6)


# --- path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("num_classes", [2, 3])
def test_smallest_C_is_where_the_first_weight_appears(num_classes, fit_intercept):
    x, y = _noisy(num_classes)
    weights = torch.linspace(0.5, 2.0, len(x))
    options = {"fit_intercept": fit_intercept, "sample_weight": weights}
    bound = l1_min_c(x, y, **options)
    below, above = l1_logistic_path(x, y, [bound * (1 - 1e-9), bound * 1.001], tol=1e-9, **options)
    assert below.sparsity == 1.0
    assert below.n_iter == 0
    assert above.coef.count_nonzero() >= 1


def test_smallest_C_is_infinite_where_no_feature_varies():
    _, y = _noisy(3)
    assert l1_min_c(torch.full((len(y), 2), 0.3, dtype=torch.float64), y) == math.inf
    assert l1_min_c(torch.empty(len(y), 0, dtype=torch.float64), y) == math.inf


def test_path_keeps_the_order_of_its_grid_and_equals_cold_fits():
    x, y = _tensors(*_data("digits 0 to 3"))
    grid = torch.tensor([1.0, 0.03, 0.2])
    path = l1_logistic_path(x, y, grid)
    assert [fit.C for fit in path] == grid.tolist()
    for fit in path:
        cold = fit_l1_logistic(x, y, C=fit.C)
        assert fit.objective == pytest.approx(cold.objective, rel=2e-6)
    assert path[0].sparsity < path[2].sparsity < path[1].sparsity


def test_a_start_at_the_solution_takes_no_step():
    x, y = _tensors(*_data("correlated, 3 classes"))
    fit = fit_l1_logistic(x, y, C=0.4, tol=1e-8)
    again = fit_l1_logistic(x, y, C=0.4, tol=1e-7, init=fit)
    assert fit.n_iter > 0
    assert again.n_iter == 0
    assert again.objective == pytest.approx(fit.objective, rel=1e-12)


def test_a_start_with_a_weight_on_a_constant_feature_loses_it():
    x, y = _noisy(2)
    fit = fit_l1_logistic(x, y, C=0.4)
    flat = x.clone()
    flat[:, 0] = 3.0
    again = fit_l1_logistic(flat, y, C=0.4, init=fit)
    assert fit.coef[0, 0] != 0.0
    assert again.coef[0, 0] == 0.0
    assert again.converged


def test_sparsity_counts_exact_zeros():
    x, y = _noisy(2)
    fit = fit_l1_logistic(x, y, C=0.1)
    assert fit.sparsity == pytest.approx(float((fit.coef == 0.0).double().mean()))
    assert 0.0 < fit.sparsity < 1.0


def test_no_features_leave_the_frequencies_of_the_classes():
    _, y = _noisy(3)
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
def test_too_few_steps_warn_with_the_remaining_gap(solver):
    x, y = _noisy(3)
    with pytest.warns(ConvergenceWarning, match=r"C=1 stopped after 1 steps.*gap of .*max_iter"):
        fit = fit_l1_logistic(x, y, max_iter=1, solver=solver)
    assert not fit.converged
    assert fit.relative_gap > 1e-6


def test_a_tolerance_below_rounding_stops_and_says_so():
    x, y = _tensors(*_data("correlated"))
    with pytest.warns(ConvergenceWarning, match=r"Rounding in torch.float32.*x.double\(\)"):
        fit = fit_l1_logistic(x.float(), y, C=0.5, tol=1e-12)
    assert fit.n_iter < 1000
    assert fit.relative_gap < 1e-5


X, Y = _noisy(3)
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
        (X, Y, {"tol": 0.0}, ValueError, r"tol must be positive"),
        (X, Y, {"max_iter": 0}, ValueError, r"max_iter must be at least 1; got 0"),
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


def test_an_empty_grid_a_misshapen_start_and_wrong_features_are_refused():
    with pytest.raises(ValueError, match="Cs must hold at least one value"):
        l1_logistic_path(X, Y, [])
    fit = fit_l1_logistic(X, Y)
    with pytest.raises(ValueError, match=r"init.coef must be \(3, 7\).*\(3, 8\)"):
        fit_l1_logistic(X[:, 1:], Y, init=fit)
    with pytest.raises(ValueError, match=r"x must be \(n, 8\).*\(60, 7\)"):
        fit.predict(X[:, 1:])


# --- cross-validation ----------------------------------------------------------------------------


def test_held_out_scores_equal_scikit_learns():
    x, y = _data("correlated, 3 classes")
    grid = [0.05, 0.5]
    found = cross_validate_l1(*_tensors(x, y), Cs=grid, cv=3, path_tol=1e-8, random_state=5)
    folds = StratifiedKFold(3, shuffle=True, random_state=5).split(x, y)
    for number, (train, test) in enumerate(folds):
        for position, C in enumerate(grid):
            model = LogisticRegression(l1_ratio=1, C=C, solver="saga", tol=1e-7, max_iter=20_000)
            model.fit(x[train], y[train])
            probs = model.predict_proba(x[test])
            # Two fits within 1e-8 of the optimum differ in a held-out loss by its square root.
            assert float(found.log_loss[number, position]) == pytest.approx(
                log_loss(y[test], probs), abs=1e-4
            )
            assert float(found.accuracy[number, position]) == pytest.approx(
                accuracy_score(y[test], probs.argmax(1))
            )
            assert int(found.num_nonzero[number, position]) == np.count_nonzero(model.coef_)
    best = int(found.log_loss.mean(0).argmin())
    assert found.index == best
    assert found.fit.C == pytest.approx(found.C) == pytest.approx(grid[best])
    assert found.fit.converged


def test_one_standard_error_chooses_the_sparsest_fit_within_it():
    x, y = _tensors(*_data("correlated"))
    best = cross_validate_l1(x, y, Cs=12)
    sparse = cross_validate_l1(x, y, Cs=12, rule="one_standard_error")
    mean = best.log_loss.mean(0)
    error = best.log_loss[:, best.index].std() / math.sqrt(len(best.log_loss))
    assert sparse.index < best.index
    assert mean[sparse.index] <= mean[best.index] + error
    assert (mean[: sparse.index] > mean[best.index] + error).all()
    assert sparse.fit.sparsity > best.fit.sparsity


def test_default_grid_starts_where_all_weights_are_zero():
    found = cross_validate_l1(X, Y, Cs=4, cv=2)
    bound = l1_min_c(X, Y)
    expected = bound * torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    torch.testing.assert_close(found.Cs, expected)


def test_of_equal_accuracies_the_smallest_C_is_chosen():
    y = torch.arange(40) % 2
    x = (y.double() - 0.5)[:, None]
    found = cross_validate_l1(x, y, Cs=[1.0, 0.4, 10.0], scoring="accuracy")
    assert (found.accuracy == 1.0).all()
    assert found.Cs.tolist() == [0.4, 1.0, 10.0]
    assert found.index == 0


def test_features_that_tell_nothing_apart_are_no_obstacle():
    y = torch.arange(40) % 2
    found = cross_validate_l1(torch.ones(40, 2, dtype=torch.float64), y, Cs=3, cv=2)
    assert found.fit.sparsity == 1.0


def test_folds_may_be_given():
    index = np.arange(len(Y))
    halves = [(index[::2], index[1::2]), (index[1::2], index[::2])]
    found = cross_validate_l1(X, Y, Cs=[0.1], cv=halves)
    assert found.log_loss.shape == (2, 1)


def test_a_training_part_without_a_class_is_refused():
    index = np.arange(len(Y))
    kept, out = index[Y.numpy() != 2], index[Y.numpy() == 2]
    with pytest.raises(ValueError, match=r"class 2 is absent from the training part of fold 0"):
        cross_validate_l1(X, Y, cv=[(kept, out)])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scoring": "f1"}, r'"log_loss" or "accuracy"; got \'f1\''),
        ({"rule": "worst"}, r'"best" or "one_standard_error"; got \'worst\''),
        ({"Cs": 0}, r"Cs must be at least one point; got 0"),
        ({"Cs": [1.0, -2.0]}, r"C must be a positive, finite number; got -2.0"),
        ({"cv": [(np.arange(60), np.arange(0))]}, r"fold 0 holds out no sample"),
    ],
)
def test_bad_options_of_cross_validation_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        cross_validate_l1(X, Y, **options)
