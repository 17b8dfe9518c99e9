"""scikit-learn's sets, divided the same way every time, nothing lost and nothing shared."""

import torch
from sklearn import datasets

from bayes_svdo.data.bundled import load_diabetes, load_digits

DIGITS_TEST_LABELS = [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
DIABETES_TEST_TARGETS = [321.0, 215.0, 127.0, 64.0, 175.0, 275.0]


def rows_of(data):
    x = torch.cat([data.x_train, data.x_test]).flatten(1).double()
    y = torch.cat([data.y_train, data.y_test]).double()
    return sorted(map(tuple, torch.column_stack([x, y]).tolist()))


def test_digits_are_divided_without_loss():
    data, bunch = load_digits(), datasets.load_digits()
    assert (len(data.x_train), len(data.x_test)) == (1437, 360)
    assert data.x_train.shape[1:] == (1, 8, 8)
    expected = torch.column_stack([torch.tensor(bunch.data) / 16, torch.tensor(bunch.target)])
    assert rows_of(data) == sorted(map(tuple, expected.tolist()))  # sixteenths are exact


def test_digits_have_the_documented_types_and_range():
    data = load_digits()
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float32, torch.int64)
    assert (data.x_train.min(), data.x_train.max(), data.num_classes) == (0, 1, 10)


def test_digits_keep_a_fifth_of_every_class_for_testing():
    data = load_digits()
    test = data.y_test.bincount()
    total = test + data.y_train.bincount()
    assert (test - 0.2 * total).abs().max() <= 1  # counts are whole


def test_digits_are_shuffled():
    """In the published order, labels begin 0, 1, 2, ..., 9, 0, 1."""
    assert load_digits().y_train[:12].tolist() != [*range(10), 0, 1]


def test_divisions_do_not_depend_on_the_run():
    """Pinned: a change here would make every earlier result incomparable."""
    assert load_digits().y_test[:12].tolist() == DIGITS_TEST_LABELS
    assert load_diabetes().y_test[:6].tolist() == DIABETES_TEST_TARGETS


def test_diabetes_is_divided_without_loss_and_in_its_own_units():
    data, bunch = load_diabetes(), datasets.load_diabetes(scaled=False)
    assert (data.x_train.shape, data.x_test.shape) == ((353, 10), (89, 10))
    expected = torch.column_stack([torch.tensor(bunch.data), torch.tensor(bunch.target)])
    assert rows_of(data) == sorted(map(tuple, expected.tolist()))
    assert data.feature_names == ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")


def test_diabetes_is_regression_in_float64():
    data = load_diabetes()
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float64, torch.float64)
    assert (data.num_classes, data.image_shape) == (None, None)
