"""Estimators behave as scikit-learn's do, and give what the functions under them give."""

import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.linear_model import ARDRegression, LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV
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
from bayes_svdo.inference.exact_regression import DegenerateObjectiveError
from bayes_svdo.inference.history import History
from bayes_svdo.inference.rvm_classification import fit_rvm_classification

# Few steps: the checks look at behaviour, on problems that a handful of steps solve.
QUICK = VDARDClassifier(max_iter=150, lr=0.05, random_state=0)
REGRESSORS = [VDARDRegressor(), RVMRegressor(), RVMRegressor(kernel="linear")]
CLASSIFIERS = [QUICK, L1LogisticRegression(), RVMClassifier()]


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([*REGRESSORS, *CLASSIFIERS])
def test_scikit_learn_check(estimator, check):
    check(estimator)


@pytest.fixture(scope="module")
def diabetes():
    return load_diabetes(return_X_y=True)


@pytest.fixture(scope="module")
def cancer():
    x, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(x)[:200], y[:200]


@pytest.mark.parametrize("regressor", [VDARDRegressor(), RVMRegressor(kernel="linear")], ids=repr)
def test_regressors_agree_with_scikit_learn_where_little_is_pruned(regressor, diabetes):
    ours, theirs = regressor.fit(*diabetes), ARDRegression().fit(*diabetes)
    assert np.corrcoef(ours.predict(diabetes[0]), theirs.predict(diabetes[0]))[0, 1] > 0.99
    assert ours.alpha_ == pytest.approx(theirs.alpha_, rel=0.05)
    mean, std = ours.predict(diabetes[0], return_std=True)
    assert std.shape == mean.shape
    assert std.min() > ours.alpha_**-0.5  # noise, and the uncertainty of weights and intercept


def test_pruned_weights_are_exact_zeros(diabetes):
    fitted = VDARDRegressor(kl_weight="bic").fit(*diabetes)
    pruned = fitted.relevance_ <= np.log(len(diabetes[0]))
    assert 0 < pruned.sum() < 10
    assert (fitted.coef_[pruned] == 0).all()
    assert np.isinf(fitted.log_alpha_[pruned]).all()
    assert (np.diff(fitted.scores_) >= -1e-8 * np.abs(fitted.scores_).max()).all()


def test_l1_is_scikit_learns_objective(cancer):
    x, y = cancer
    ours = L1LogisticRegression(C=0.1, fit_intercept=False).fit(x, y)
    theirs = LogisticRegression(
        C=0.1, l1_ratio=1.0, solver="liblinear", fit_intercept=False, tol=1e-10, max_iter=10_000
    ).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-4)


def test_svi_classifier_is_sparse_and_accurate(cancer):
    x, y = cancer
    rng = np.random.default_rng(0)
    noisy = np.hstack([x, rng.standard_normal((len(x), 20))])
    fitted = VDARDClassifier(max_iter=1000, random_state=0).fit(noisy, y)
    assert fitted.score(noisy, y) > 0.93
    assert (np.isinf(fitted.log_alpha_) | (fitted.log_alpha_ >= 3) == (fitted.coef_ == 0)).all()


@pytest.mark.parametrize("kl_weight", [1.0, 3.84])
def test_noise_is_pruned_as_often_as_chi_square_is_below_the_kl_weight(kl_weight):
    """Of 60 features of pure noise; Gaussian as the posterior of 569 data, so binomial at 99.9 %.

    log_alpha = 3, where a weight counts as pruned, is reached a little above the threshold, at
    z² = 1.084 kl_weight.
    """
    x, y = load_breast_cancer(return_X_y=True)
    noise = np.random.default_rng(1).standard_normal((len(x), 60))
    inputs = np.hstack([StandardScaler().fit_transform(x)[:, :5], noise])
    fitted = VDARDClassifier(max_iter=1000, kl_weight=kl_weight, random_state=0).fit(inputs, y)
    pruned = int((fitted.coef_[0, 5:] == 0).sum())
    least, most = stats.binom(60, stats.chi2.cdf(1.084 * kl_weight, 1)).ppf([0.0005, 0.9995])
    assert least <= pruned <= most


def test_a_heavier_kl_leaves_fewer_weights(cancer):
    light, heavy = (
        VDARDClassifier(max_iter=400, kl_weight=weight, random_state=0).fit(*cancer)
        for weight in (0.1, 10.0)
    )
    assert np.count_nonzero(heavy.coef_) < np.count_nonzero(light.coef_)


def test_where_the_variances_start_is_where_they_are_without_training(cancer):
    fitted = VDARDClassifier(init_log_sigma2=-4.0, max_iter=1, lr=1e-9, random_state=0)
    sigma = fitted.fit(*cancer).sigma_ * cancer[0].std(0)
    np.testing.assert_allclose(sigma, np.exp(-2.0), rtol=1e-6)


@pytest.mark.parametrize("standardize", [True, False])
def test_units_do_not_matter_where_features_are_standardised(cancer, standardize):
    x, y = cancer
    units = np.where(np.arange(30) % 2, 8.0, 0.125)  # powers of 2, which round nothing
    model = VDARDClassifier(max_iter=100, standardize=standardize, random_state=0)
    plain, scaled = clone(model).fit(x, y), clone(model).fit(x * units, y)
    same = np.allclose(scaled.coef_ * units, plain.coef_, rtol=1e-3, atol=1e-6)
    assert same is standardize
    whole = clone(model).fit(4 * x, y)  # one unit for all never matters
    np.testing.assert_allclose(4 * whole.coef_, plain.coef_, rtol=1e-3, atol=1e-6)


def test_ctrl_c_ends_a_fit_and_what_it_is_part_of(cancer, monkeypatch):
    """And never leaves a half-trained estimator that passes for a fitted one."""

    def interrupted(self, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(History, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        QUICK.fit(*cancer)


@pytest.mark.parametrize("classifier", CLASSIFIERS, ids=lambda c: type(c).__name__)
def test_labels_may_be_strings_and_probabilities_sum_to_one(classifier):
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    fitted = clone(classifier).fit(x, names)
    assert list(fitted.classes_) == ["setosa", "versicolor", "virginica"]
    assert set(fitted.predict(x)) <= set(names)
    np.testing.assert_allclose(fitted.predict_proba(x).sum(1), 1)
    assert fitted.score(x, names) > 0.9


@pytest.mark.parametrize("estimator", [*REGRESSORS, *CLASSIFIERS], ids=lambda e: type(e).__name__)
def test_pickled_it_predicts_the_same_and_tensors_are_taken(estimator, diabetes, cancer):
    x, y = cancer if estimator in CLASSIFIERS else diabetes
    fitted = clone(estimator).fit(torch.as_tensor(x), torch.as_tensor(y))
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(x), fitted.predict(torch.as_tensor(x)))


def test_grid_search_in_a_pipeline(cancer):
    pipeline = make_pipeline(StandardScaler(), L1LogisticRegression())
    search = GridSearchCV(pipeline, {"l1logisticregression__C": [1e-4, 0.1, 1.0]}, cv=3)
    search.fit(*cancer)
    assert search.best_params_["l1logisticregression__C"] != 1e-4


def test_precomputed_kernel_and_its_equal(diabetes):
    x, y = diabetes
    gamma = 1 / (10 * x.var())
    kernel = rbf_kernel(x[:200], gamma=gamma)
    ours = RVMRegressor(kernel="precomputed").fit(kernel, y[:200])
    same = RVMRegressor(gamma=gamma).fit(x[:200], y[:200])
    np.testing.assert_array_equal(ours.relevance_, same.relevance_)
    np.testing.assert_allclose(ours.predict(kernel), same.predict(x[:200]), rtol=1e-6)


def test_bad_input_is_refused_in_words(diabetes):
    x, y = diabetes
    with pytest.raises(ValueError, match="NaN"):
        VDARDRegressor().fit(np.where(x > 0.1, np.nan, x), y)
    with pytest.raises(ValueError, match="one class only"):
        L1LogisticRegression().fit(x, np.zeros(len(y), dtype=int))
    with pytest.raises(DegenerateObjectiveError, match="kl_weight"):
        VDARDRegressor().fit(np.random.default_rng(0).standard_normal((20, 40)), y[:20])
    with pytest.raises(ValueError, match="10 features"):
        VDARDRegressor().fit(x, y).predict(x[:, :3])


def test_a_constant_target_is_its_own_prediction(diabetes):
    fitted = VDARDRegressor().fit(diabetes[0], np.full(442, 3.0))
    assert (fitted.predict(diabetes[0]) == 3.0).all()
    assert not fitted.coef_.any()


def test_a_target_that_is_constant_up_to_rounding_is_constant(diabetes):
    x = diabetes[0]
    fitted = VDARDRegressor().fit(x, np.where(x[:, 0] > 0, 0.1 + 0.2, 0.3))
    assert not fitted.coef_.any()
    assert fitted.alpha_ == np.inf
    mean, std = fitted.predict(x, return_std=True)
    np.testing.assert_allclose(mean, 0.3, rtol=1e-15)
    assert not std.any()
    with pytest.raises(ValueError, match="max_iter must be"):
        VDARDRegressor(max_iter=0).fit(x, np.ones(len(x)))


def test_a_constant_target_with_a_known_noise_is_as_uncertain_as_that(diabetes):
    fitted = VDARDRegressor(noise_precision=4.0).fit(diabetes[0], np.full(442, 0.3))
    assert not fitted.coef_.any()
    assert fitted.alpha_ == pytest.approx(4.0)
    _, std = fitted.predict(diabetes[0], return_std=True)
    np.testing.assert_allclose(std, 0.5 * np.sqrt(1 + 1 / 442))


@pytest.mark.parametrize("remedy", [{"min_noise": 1e-3}, {"noise_precision": 1e4}], ids=str)
def test_what_the_error_of_a_perfect_fit_advises_works(remedy):
    """Where there are more features than observations too."""
    x = np.random.default_rng(0).standard_normal((20, 40))
    y = x[:, 0]
    with pytest.raises(DegenerateObjectiveError, match=next(iter(remedy))):
        VDARDRegressor(kl_weight=2.0).fit(x, y)
    fitted = VDARDRegressor(kl_weight=2.0, **remedy).fit(x, y)
    precision = remedy.get("noise_precision", 1 / (1e-3 * y.std()) ** 2)
    assert fitted.alpha_ == pytest.approx(precision, rel=0.1)
    assert fitted.coef_[0] == pytest.approx(1, abs=0.01)


def test_a_perfect_fit_of_few_features_is_bounded_by_default(diabetes):
    x = diabetes[0]
    fitted = VDARDRegressor().fit(x, x[:, 2])
    assert fitted.alpha_ == pytest.approx(1 / (1e-4 * x[:, 2].std()) ** 2, rel=0.05)
    with pytest.raises(DegenerateObjectiveError, match="min_noise"):
        VDARDRegressor(min_noise=0.0).fit(x, x[:, 2])


@pytest.mark.parametrize("unit", [1e-200, 1e-160, 1e200])
def test_the_predictive_deviation_does_not_depend_on_units(diabetes, unit):
    x, y = diabetes
    plain, scaled = VDARDRegressor().fit(x, y), VDARDRegressor().fit(x * unit, y)
    np.testing.assert_allclose(scaled.sigma_ * unit, plain.sigma_)
    expected = plain.predict(x, return_std=True)
    np.testing.assert_allclose(scaled.predict(x * unit, return_std=True), expected)


@pytest.mark.parametrize("machine", [RVMRegressor, RVMClassifier])
def test_no_coefficients_outlive_the_kernel_they_belong_to(cancer, machine):
    fitted = machine(kernel="linear").fit(cancer[0], cancer[1])
    assert fitted.coef_.shape[-1] == 30
    fitted.set_params(kernel="rbf").fit(cancer[0], cancer[1])
    assert not hasattr(fitted, "coef_")


@pytest.mark.parametrize("method", ["mackay", "em"])
def test_the_older_updates_of_the_classifier_are_those_of_the_function(method):
    x, y = load_iris(return_X_y=True)
    fitted = RVMClassifier(kernel="linear", method=method).fit(x, y)
    machine = fit_rvm_classification(torch.as_tensor(x), torch.as_tensor(y), method=method)
    np.testing.assert_array_equal(
        fitted.predict_proba(x), machine.predict_proba(torch.as_tensor(x))
    )
    assert fitted.n_iter_ == machine.n_iter
    assert fitted.n_iter_ != clone(fitted).set_params(method="fast").fit(x, y).n_iter_
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'slow'"):
        RVMClassifier(method="slow").fit(x, y)


def test_the_machines_of_a_classifier_can_be_looked_at():
    x, y = load_iris(return_X_y=True)
    fitted = RVMClassifier(kernel="linear").fit(x, y)
    parts = (fitted.machine_relevance_, fitted.dual_coef_, fitted.sigma_, fitted.lambda_)
    assert [len(part) for part in (*parts, fitted.scores_)] == [3] * 5
    for coef, index, weights, covariance, precision in zip(fitted.coef_, *parts, strict=True):
        assert set(index) <= set(fitted.relevance_)
        np.testing.assert_array_equal(coef[index], weights)
        assert np.count_nonzero(coef) == len(index) == len(precision)
        assert covariance.shape == (len(index), len(index))
        assert (np.diag(covariance) < 1 / precision).all()  # data narrow the prior
    assert all((np.diff(scores) > 0).all() for scores in fitted.scores_)
    assert max(map(len, fitted.scores_)) == fitted.n_iter_


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("max_iter", 0),
        ("max_iter", -5),
        ("max_iter", 2.5),
        ("kl_weight", "bic"),
        ("kl_weight", -1.0),
        ("kl_weight", np.inf),
        ("init_log_sigma2", "small"),
    ],
)
def test_bad_options_of_the_svi_classifier_are_named(cancer, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be .* but is {value!r}"):
        VDARDClassifier(**{name: value}).fit(*cancer)


@pytest.mark.parametrize("value", ["no", None, 2])
@pytest.mark.parametrize("estimator", [*REGRESSORS, *CLASSIFIERS], ids=lambda e: type(e).__name__)
def test_what_is_neither_true_nor_false_is_refused(cancer, estimator, value):
    """Of every option whose default is one of them: a string would count as true."""
    options = [name for name, own in estimator.get_params().items() if isinstance(own, bool)]
    assert options
    for name in options:
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
            clone(estimator).set_params(**{name: value}).fit(*cancer)


@pytest.mark.parametrize(
    ("standardize", "unit"),
    [
        (True, 1e-200),
        (True, 1e200),
        (True, [1e170, 1.0, 1e-200, 1.0]),
        (False, 1e-200),
        (False, 1e200),
    ],
)
def test_no_unit_is_too_large_or_too_small(standardize, unit):
    x = np.random.default_rng(0).standard_normal((200, 4))
    y = x[:, 0] > 0
    model = VDARDClassifier(max_iter=100, lr=0.05, standardize=standardize, random_state=0)
    plain, scaled = clone(model).fit(x, y), clone(model).fit(x * unit, y)
    assert plain.score(x, y) > 0.95
    np.testing.assert_allclose(scaled.coef_ * unit, plain.coef_, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        scaled.predict_proba(x * unit), plain.predict_proba(x), rtol=1e-3, atol=1e-5
    )


def test_a_feature_that_is_constant_up_to_rounding_tells_nothing():
    x = np.random.default_rng(0).standard_normal((200, 2))
    y = x[:, 0] > 0
    x[:, 1] = np.where(y, 0.1 + 0.2, 0.3)
    fitted = VDARDClassifier(max_iter=100, lr=0.05, random_state=0).fit(x, y)
    same = x * [1, 0] + [0, 0.3]
    np.testing.assert_allclose(fitted.predict_proba(x), fitted.predict_proba(same), rtol=1e-9)
    assert fitted.score(x, y) > 0.95


@pytest.mark.parametrize(
    "grid",
    [
        {"degree": np.arange(1, 3)},
        {"gamma": np.array([0.1, 0.5], dtype=np.float32)},
        {"max_iter": np.array([50, 100])},
    ],
    ids=lambda grid: next(iter(grid)),
)
def test_a_grid_of_numpys_numbers_can_be_searched(grid) -> None:
    x, noise = np.random.default_rng(0).normal(size=(2, 60, 2))
    search = GridSearchCV(RVMRegressor(kernel="poly"), grid, cv=2, error_score="raise")
    assert np.isfinite(search.fit(x, x[:, 0] ** 2 + noise[:, 0]).best_score_)


@pytest.mark.parametrize("option", ["tol", "coef0", "gamma", "degree", "max_iter"])
def test_an_option_of_the_rvm_that_is_no_number_is_named(option: str) -> None:
    x = np.random.default_rng(0).normal(size=(30, 2))
    for value in ("a", None):
        with pytest.raises(ValueError, match=f"{option} must be"):
            RVMRegressor(kernel="poly", **{option: value}).fit(x, x[:, 0])
