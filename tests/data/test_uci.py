"""A UCI set is its table, divided by its own index files, and every file is checked."""

import os

import numpy as np
import pytest
import torch

from bayes_svdo.data import CorruptDataError, DataNotFoundError
from bayes_svdo.data.fetch import ENVIRONMENT_VARIABLE
from bayes_svdo.data.uci import UCI_SETS, load_uci

REAL_DATA = os.environ.get("BAYES_SVDO_DATA")
TABLE = np.arange(10 * 7, dtype=float).reshape(10, 7) / 8


@pytest.fixture
def folder(tmp_path):
    """A yacht set of ten rows, with splits 0 and 19."""
    folder = tmp_path / "root/UCI_Datasets/yacht/data"
    folder.mkdir(parents=True)
    np.savetxt(folder / "data.txt", TABLE)
    np.savetxt(folder / "index_features.txt", range(6), fmt="%d")
    np.savetxt(folder / "index_target.txt", [6], fmt="%d")
    for split in (0, 19):
        order = np.roll(np.arange(10), split)
        np.savetxt(folder / f"index_train_{split}.txt", order[:8], fmt="%d")
        np.savetxt(folder / f"index_test_{split}.txt", order[8:], fmt="%d")
    return folder


@pytest.fixture
def root(folder):
    return folder.parents[2]


@pytest.mark.parametrize("split", [0, 19])
def test_rows_and_columns_are_those_that_the_index_files_name(root, split):
    data = load_uci("yacht", root, split=split)
    order = np.roll(np.arange(10), split)
    np.testing.assert_array_equal(data.x_train, TABLE[order[:8], :6])
    np.testing.assert_array_equal(data.y_train, TABLE[order[:8], 6])
    np.testing.assert_array_equal(data.x_test, TABLE[order[8:], :6])
    np.testing.assert_array_equal(data.y_test, TABLE[order[8:], 6])


def test_tensors_are_float64_and_columns_have_names(root):
    data = load_uci("yacht", root)
    assert (data.x_train.dtype, data.y_train.dtype) == (torch.float64, torch.float64)
    assert data.y_train.shape == (8,)
    assert data.num_classes is None
    assert data.feature_names[-1] == "froude_number"


def test_root_may_be_the_collection_itself(root):
    assert len(load_uci("yacht", root / "UCI_Datasets").x_train) == 8


def test_environment_and_cache_are_searched_without_root(root, cache, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(root))
    assert len(load_uci("yacht").x_train) == 8
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    cache.mkdir()
    (root / "UCI_Datasets").rename(cache / "UCI_Datasets")
    assert len(load_uci("yacht").x_train) == 8


@pytest.mark.parametrize("split", [-1, 20])
def test_split_out_of_range_is_refused(root, split):
    with pytest.raises(ValueError, match=rf"split must be between 0 and 19.*'yacht'; got {split}"):
        load_uci("yacht", root, split=split)


def test_missing_set_says_what_to_put_where(cache):
    with pytest.raises(DataNotFoundError) as caught:
        load_uci("boston")
    message = str(caught.value)
    place = cache / "UCI_Datasets/bostonHousing"
    for expected in [
        "'boston'",
        f"{place / 'data'}: no files",
        f"to {place},",
        "DropoutUncertainty",
    ]:
        assert expected in message


def test_missing_file_is_named(folder, root):
    (folder / "index_test_0.txt").unlink()
    with pytest.raises(DataNotFoundError, match=r"yacht/data: lacks index_test_0\.txt\n"):
        load_uci("yacht", root)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("data.txt", "1 2\n3\n", "data.txt is not a table of numbers"),
        ("data.txt", "", "data.txt is not a table of numbers"),
        ("data.txt", "1 2 three\n", "data.txt is not a table of numbers.*three"),
        ("data.txt", b"\x1f\x8b\xff\xfe", "data.txt is not a table of numbers"),
        ("data.txt", "1 2 3 4 5 6 nan\n" * 10, "data.txt holds NaN"),
        ("data.txt", "1 2 3 4 5 6\n" * 10, "index_target.txt must hold one index from 0 to 5"),
        ("index_train_0.txt", "0\n10\n", r"index_train_0.txt.*from 0 to 9.*from 0 to 10"),
        ("index_train_0.txt", "-1\n3\n", r"index_train_0.txt.*from -1 to 3"),
        ("index_train_0.txt", "0\n3\n0\n", "index_train_0.txt names a row or column more than"),
        ("index_train_0.txt", "0.5\n", "index_train_0.txt is not a table of numbers"),
        ("index_train_0.txt", "0 1\n2 3\n", r"index_train_0.txt.*shape \(2, 2\)"),
        (
            "index_train_0.txt",
            "0\n9\n",
            "index_train_0.txt and index_test_0.txt share 1 indices, 9",
        ),
        ("index_features.txt", "0\n1\n", "2 and 1 columns; 'yacht' has 6 features and 1 target"),
        ("index_features.txt", "0\n1\n2\n3\n4\n6\n", "index_target.txt share 1 indices, 6"),
        ("index_target.txt", "5\n6\n", "6 and 2 columns"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # as in a program whose user does not heed warnings
def test_file_that_is_not_what_it_should_be_is_refused_by_name(
    folder, root, file, content, message
):
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorruptDataError, match=message):
        load_uci("yacht", root)


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA, reason="BAYES_SVDO_DATA is not set")
@pytest.mark.parametrize(
    ("name", "rows", "features"),
    [
        ("boston", 506, 13),
        ("concrete", 1030, 8),
        ("energy", 768, 8),
        ("kin8nm", 8192, 8),
        ("yacht", 308, 6),
    ],
)
def test_every_real_split_divides_the_whole_set(name, rows, features):
    assert len(UCI_SETS[name].feature_names) == features
    splits = [load_uci(name, REAL_DATA, split=split) for split in range(20)]
    reference = torch.cat([splits[0].y_train, splits[0].y_test]).sort().values
    for data in splits:
        assert len(data.x_train) == round(0.9 * rows)
        assert len(data.x_train) + len(data.x_test) == rows
        assert torch.equal(torch.cat([data.y_train, data.y_test]).sort().values, reference)
    assert len({tuple(data.y_test.tolist()) for data in splits}) == 20


@pytest.mark.real_data
@pytest.mark.skipif(not REAL_DATA, reason="BAYES_SVDO_DATA is not set")
def test_boston_columns_carry_the_right_names():
    """Facts of the Boston set: one binary column, chas; mean price 22.53; rm between 3 and 9."""
    data = load_uci("boston", REAL_DATA)
    x = dict(zip(data.feature_names, torch.cat([data.x_train, data.x_test]).T, strict=True))
    assert [name for name in x if len(x[name].unique()) == 2] == ["chas"]
    assert 3 < x["rm"].min() < x["rm"].max() < 9
    assert torch.cat([data.y_train, data.y_test]).mean().item() == pytest.approx(22.533, abs=5e-4)
