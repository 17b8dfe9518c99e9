"""The divisions of the data, and each method once, short."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from bayes_svdo import data
from bayes_svdo.data import DataSet
from bayes_svdo.experiments import compare_methods
from bayes_svdo.experiments.compare_methods import (
    DIGITS,
    L1,
    METHODS,
    MNIST,
    NOISY_DIGITS,
    RVM,
    VDARD,
    evaluate,
    make_task,
)


def test_the_digits_are_halved_each_image_with_its_label():
    task = make_task(DIGITS, 3)
    assert (len(task.x_train), len(task.x_test)) == (898, 899)
    assert task.image_shape == (8, 8)
    published = load_digits()
    x = np.vstack([task.x_train, task.x_test]) * 16
    y = np.concatenate([task.y_train, task.y_test])
    order, expected = np.lexsort((*x.T, y)), np.lexsort((*published.data.T, published.target))
    np.testing.assert_array_equal(x[order], published.data[expected])
    np.testing.assert_array_equal(y[order], published.target[expected])


def test_a_seed_is_a_division_and_the_noise_comes_on_top_of_it():
    plain, again, other = make_task(DIGITS, 3), make_task(DIGITS, 3), make_task(DIGITS, 4)
    noisy = make_task(NOISY_DIGITS, 3)
    np.testing.assert_array_equal(plain.x_train, again.x_train)
    assert (plain.y_train != other.y_train).any()
    np.testing.assert_array_equal(noisy.x_test[:, :64], plain.x_test)
    np.testing.assert_array_equal(noisy.y_train, plain.y_train)
    noise = np.vstack([noisy.x_train[:, 64:], noisy.x_test[:, 64:]])
    assert noise.shape == (1797, 64)
    assert 0 <= noise.min() < 1e-3 < 1 - 1e-3 < noise.max() <= 1
    # Of 115,008 uniform numbers: 6 standard errors.
    assert noise.mean() == pytest.approx(0.5, abs=6 * (1 / 12 / noise.size) ** 0.5)


def test_mnist_keeps_its_test_set(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 1, 28, 28, generator=generator)
    y = torch.arange(30) % 10
    whole = DataSet("mnist", x[:20], y[:20], x[20:], y[20:], num_classes=10)
    monkeypatch.setattr(data, "load", lambda name, root: whole)
    task = make_task(MNIST, 5)
    np.testing.assert_array_equal(task.x_test, x[20:].flatten(1).double().numpy())
    np.testing.assert_array_equal(task.y_train, y[:20].numpy())
    assert task.image_shape == (28, 28)
    assert RVM not in METHODS[MNIST]


def test_an_unknown_name_is_refused_with_the_closest():
    with pytest.raises(ValueError, match=r'"digits\+nose".*Did you mean "digits\+noise"'):
        make_task("digits+nose", 0)


@pytest.fixture(scope="module")
def task():
    """A fifth of the noisy digits to train on, and all of its test half."""
    whole = make_task(NOISY_DIGITS, 0)
    return whole._replace(x_train=whole.x_train[:200], y_train=whole.y_train[:200])


@pytest.fixture
def short(monkeypatch):
    settings = compare_methods.VDARD_SETTINGS[NOISY_DIGITS] | {"max_iter": 200, "lr": 0.05}
    monkeypatch.setitem(compare_methods.VDARD_SETTINGS, NOISY_DIGITS, settings)
    quick = {"Cs": [0.1, 1.0], "cv": 2, "tol": 1e-3}
    monkeypatch.setitem(compare_methods.L1_SETTINGS, NOISY_DIGITS, quick)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("method", METHODS[NOISY_DIGITS])
def test_a_method_is_accurate_and_its_numbers_agree(method, task):
    outcome = evaluate(method, NOISY_DIGITS, task, seed=0, device="cpu")
    assert outcome.accuracy > 75  # guessing gives 10
    assert 0 < outcome.log_loss < 2.3 - 1  # guessing gives log 10
    assert outcome.weights == 10 * 128
    assert outcome.sparsity == pytest.approx(100 - 100 * outcome.nonzero / 1280)
    assert 0 < outcome.nonzero < 1280
    assert (outcome.C is not None) == (method == L1)
    if method == VDARD:
        assert (outcome.log_alpha < 3).sum() == outcome.nonzero
    else:
        assert outcome.log_alpha is None


@pytest.mark.usefixtures("short")
def test_a_part_held_out_can_choose_c(task, monkeypatch):
    settings = {"Cs": [1e-3, 1.0], "held_out": 50, "tol": 1e-3}
    monkeypatch.setitem(compare_methods.L1_SETTINGS, NOISY_DIGITS, settings)
    assert evaluate(L1, NOISY_DIGITS, task, seed=0, device="cpu").C == 1.0
