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
