"""A data set's tensors fit together, and a validation split takes nothing from the test set."""

import dataclasses

import pytest
import torch

from bayes_svdo.data import DataSet


def make(**changes):
    fields = {
        "name": "made",
        "x_train": torch.arange(40.0).reshape(20, 2),
        "y_train": torch.arange(20) % 3,
        "x_test": -torch.arange(1.0, 11.0).reshape(5, 2),
        "y_test": torch.arange(5) % 3,
        "num_classes": 3,
    }
    return DataSet(**(fields | changes))


def test_train_and_test_are_the_pairs():
    data = make()
    assert data.train == (data.x_train, data.y_train)
    assert data.test == (data.x_test, data.y_test)


def test_image_shape_is_that_of_one_image_and_none_for_columns():
    images = make(x_train=torch.zeros(20, 3, 8, 6), x_test=torch.zeros(5, 3, 8, 6))
    assert images.image_shape == (3, 8, 6)
    assert make().image_shape is None


def test_data_set_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().name = "other"


def test_repr_describes_instead_of_printing_tensors():
    assert repr(make()) == "DataSet('made', 20 train, 5 test, inputs (2,), 3 classes)"
    regression = make(num_classes=None, y_train=torch.zeros(20), y_test=torch.zeros(5))
    assert repr(regression).endswith("regression)")


def test_validation_split_divides_the_training_set():
    data = make()
    split = data.with_validation_split(6, seed=1)
    assert (len(split.x_train), len(split.x_test)) == (14, 6)
    rows = torch.cat([split.x_train, split.x_test])
    assert torch.equal(rows[rows[:, 0].argsort()], data.x_train)
    for x, y in (split.train, split.test):  # a row keeps its label: x = 2 i in column 0
        assert torch.equal(y, (x[:, 0] / 2).long() % 3)


def test_validation_split_says_so_in_its_name_and_keeps_the_rest():
    split = make(feature_names=("a", "b")).with_validation_split(6, seed=1)
    assert (split.name, split.num_classes) == ("made-validation", 3)
    assert split.feature_names == ("a", "b")


def test_validation_split_follows_its_seed_alone():
    data = make()
    torch.manual_seed(0)
    first = data.with_validation_split(6, seed=1)
    torch.manual_seed(1)
    assert torch.equal(first.x_test, data.with_validation_split(6, seed=1).x_test)
    assert not torch.equal(first.x_test, data.with_validation_split(6, seed=2).x_test)


def test_validation_split_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    make().with_validation_split(6, seed=1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("num_validation", [0, -1, 20, 21])
def test_validation_split_without_one_of_its_parts_is_refused(num_validation):
    with pytest.raises(ValueError, match=rf"between 1 and 19.*got {num_validation}"):
        make().with_validation_split(num_validation, seed=0)


def test_fractional_validation_split_is_refused():
    with pytest.raises(TypeError):
        make().with_validation_split(0.2, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_train": torch.zeros(19, dtype=torch.long)}, r"y_train.*\(20, 2\) and \(19,\)"),
        ({"y_test": torch.zeros(5, 1, dtype=torch.long)}, r"y_test.*\(5, 2\) and \(5, 1\)"),
        ({"x_test": torch.zeros(0, 2), "y_test": torch.zeros(0).long()}, r"N >= 1.*\(0, 2\)"),
        ({"x_train": torch.zeros(20)}, r"x_train of shape \(N, \.\.\.\).*\(20,\)"),
        ({"x_test": torch.zeros(5, 3)}, r"x_train has shape \(2,\), one row of x_test \(3,\)"),
        ({"x_train": torch.full((20, 2), torch.nan)}, "x_train holds NaN"),
        ({"x_test": torch.full((5, 2), torch.inf)}, "x_test holds NaN or infinite"),
        ({"y_train": torch.zeros(20)}, r"y_train is torch.float32; class labels.*int64"),
        ({"y_train": torch.full((20,), 3)}, "y_train has labels from 3 to 3; expected 0 to 2"),
        ({"y_test": torch.full((5,), -1)}, "y_test has labels from -1 to -1"),
        ({"num_classes": None}, "y_train is torch.int64; regression"),
        ({"feature_names": ("a",)}, r"1 feature_names for rows of shape \(2,\)"),
        ({"y_train": torch.zeros(20, dtype=torch.long, device="meta")}, "is on cpu, y_train on me"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"'made'.*{message}"):
        make(**changes)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_validation_split_is_the_same_on_every_device():
    on_cpu = make()
    on_gpu = dataclasses.replace(
        on_cpu,
        **{
            name: getattr(on_cpu, name).cuda()
            for name in ("x_train", "y_train", "x_test", "y_test")
        },
    )
    expected = on_cpu.with_validation_split(6, seed=1)
    split = on_gpu.with_validation_split(6, seed=1)
    assert split.x_test.is_cuda
    assert torch.equal(split.x_test.cpu(), expected.x_test)
