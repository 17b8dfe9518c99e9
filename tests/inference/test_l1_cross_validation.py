"""C by cross-validation, beside scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import StratifiedKFold

from bayes_svdo.inference.l1 import l1_min_c
from bayes_svdo.inference.l1_cross_validation import cross_validate_l1

Y = torch.arange(60) % 3
X = torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_held_out_scores_equal_scikit_learns(correlated):
    x, y = correlated(200, 15, 3)
    grid = [0.05, 0.5]
    found = cross_validate_l1(
        torch.as_tensor(x), torch.as_tensor(y), Cs=grid, cv=3, path_tol=1e-8, random_state=5
    )
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


def test_one_standard_error_chooses_the_sparsest_fit_within_it(correlated):
    x, y = map(torch.as_tensor, correlated(200, 20, 2))
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
