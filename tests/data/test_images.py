"""MNIST's tensors are its files' bytes, and files that do not fit together are refused."""

import gzip
import os
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from bayes_svdo.data import CorruptDataError
from bayes_svdo.data.images import IDX_SETS, load_idx_set

REAL_DATA = os.environ.get("BAYES_SVDO_DATA")
PUBLISHED = {name: files.sha256 for name, files in IDX_SETS.items()}
real_data = pytest.mark.skipif(not REAL_DATA, reason="BAYES_SVDO_DATA is not set")


def packed(values, as_idx):
    return gzip.compress(as_idx(np.asarray(values, dtype=np.uint8)))


def test_tensors_are_the_bytes_of_the_files(tiny, lay_out, tmp_path):
    data = load_idx_set("mnist", lay_out(tmp_path / "root", tiny))
    assert (data.name, data.num_classes, data.image_shape) == ("mnist", 10, (1, 28, 28))
    assert data.x_train.shape == (12, 1, 28, 28)
    assert data.x_train.dtype == torch.float32
    assert data.y_train.dtype == torch.int64
    pixels = np.frombuffer(gzip.decompress(tiny["t10k-images-idx3-ubyte.gz"])[16:], np.uint8)
    assert torch.equal((data.x_test * 255).round().flatten().to(torch.uint8), torch.tensor(pixels))
    assert data.y_test.tolist() == [0, 1, 2, 3, 4]


def test_black_is_zero_and_white_is_one(tiny, lay_out, tmp_path, as_idx):
    extremes = np.zeros((5, 28, 28)) + 255 * (np.arange(5) % 2)[:, None, None]
    changed = tiny | {"t10k-images-idx3-ubyte.gz": packed(extremes, as_idx)}
    x = load_idx_set("mnist", lay_out(tmp_path / "root", changed)).x_test
    assert x[0].unique().tolist() == [0.0]
    assert x[1].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("t10k-labels-idx1", np.zeros(4), r"t10k-images.* 5 images, but .*t10k-labels.* 4 labels"),
        ("t10k-labels-idx1", [0, 1, 2, 3, 10], "t10k-labels.*the label 10; .* 0 to 9"),
        ("train-images-idx3", np.zeros((12, 14, 56)), "train-images.*14 x 56 pixels.*28 x 28"),
    ],
)
def test_files_that_do_not_fit_together_are_refused_by_name(
    tiny, lay_out, tmp_path, as_idx, file, values, message
):
    changed = tiny | {f"{file}-ubyte.gz": packed(values, as_idx)}
    with pytest.raises(CorruptDataError, match=message):
        load_idx_set("mnist", lay_out(tmp_path / "root", changed))


def test_empty_pair_of_files_is_refused_by_name(tiny, lay_out, tmp_path, as_idx):
    changed = tiny | {
        "train-images-idx3-ubyte.gz": packed(np.zeros((0, 28, 28)), as_idx),
        "train-labels-idx1-ubyte.gz": packed(np.zeros(0), as_idx),
    }
    with pytest.raises(CorruptDataError, match=r"train-images.*holds no images"):
        load_idx_set("mnist", lay_out(tmp_path / "root", changed))


@pytest.mark.parametrize("file", sorted(PUBLISHED["mnist"]))
def test_truncated_file_is_refused_by_name(tiny, lay_out, tmp_path, file):
    root = lay_out(tmp_path / "root", tiny | {file: tiny[file][:-9]})
    with pytest.raises(CorruptDataError, match=f"{file}.*delete it to have it downloaded again"):
        load_idx_set("mnist", root)


def test_files_of_the_other_set_are_refused(tiny, lay_out, tmp_path, publish):
    """Both sets use the same file names; only their contents tell them apart."""
    publish(tiny, name="mnist")
    root = lay_out(tmp_path / "root", tiny)
    with pytest.raises(CorruptDataError, match="is the file of 'mnist', not of 'fashion-mnist'"):
        load_idx_set("fashion-mnist", root)


def test_every_mirror_is_an_address_to_which_a_file_name_can_be_added():
    for files in IDX_SETS.values():
        assert all(mirror.endswith("/") for mirror in files.mirrors)
        assert len(set(files.sha256.values())) == 4


@pytest.mark.real_data
@real_data
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_checksums_are_those_of_the_published_files(name):
    for file, digest in PUBLISHED[name].items():
        assert pooch.file_hash(Path(REAL_DATA, name, file), alg="sha256") == digest, file


@pytest.mark.real_data
@real_data
@pytest.mark.parametrize(
    ("name", "mean", "std", "zeros"),
    [("mnist", 0.1307, 0.3081, 5923), ("fashion-mnist", 0.2860, 0.3530, 6000)],
)
def test_real_sets_have_their_published_sizes_and_moments(name, mean, std, zeros):
    """Mean and deviation of the training pixels as everyone normalises with, to 4 digits."""
    data = load_idx_set(name, REAL_DATA)
    assert (len(data.x_train), len(data.x_test)) == (60_000, 10_000)
    assert data.x_train.double().mean().item() == pytest.approx(mean, abs=5e-5)
    assert data.x_train.double().std().item() == pytest.approx(std, abs=5e-5)
    assert int((data.y_train == 0).sum()) == zeros
    assert (data.x_train.min(), data.x_train.max()) == (0, 1)
