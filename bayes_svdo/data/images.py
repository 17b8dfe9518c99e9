"""MNIST and Fashion-MNIST, from their four original idx files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pooch
import torch
from torch import Tensor

from bayes_svdo.data.dataset import DataSet
from bayes_svdo.data.errors import CorruptDataError
from bayes_svdo.data.fetch import RemoteFiles, obtain
from bayes_svdo.data.idx import read_idx

_NUM_CLASSES = 10
_SIDE = 28

IDX_SETS: dict[str, RemoteFiles] = {
    # LeCun, Bottou, Bengio & Haffner (1998), Gradient-based learning applied to document
    # recognition. Its own site has stopped serving the files; these two mirrors hold copies.
    "mnist": RemoteFiles(
        name="mnist",
        folders=("mnist", "MNIST/raw"),
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        sha256={
            "train-images-idx3-ubyte.gz": (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"
            ),
            "train-labels-idx1-ubyte.gz": (
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"
            ),
        },
    ),
    # Xiao, Rasul & Vollgraf (2017). https://arxiv.org/abs/1708.07747
    "fashion-mnist": RemoteFiles(
        name="fashion-mnist",
        folders=("fashion-mnist", "FashionMNIST/raw"),
        mirrors=("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        sha256={
            "train-images-idx3-ubyte.gz": (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
            ),
            "train-labels-idx1-ubyte.gz": (
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
            ),
            "t10k-images-idx3-ubyte.gz": (
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
            ),
            "t10k-labels-idx1-ubyte.gz": (
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
            ),
        },
    ),
}


def load_idx_set(
    name: str, root: str | os.PathLike[str] | None = None, *, progress: bool = True
) -> DataSet:
    """MNIST or Fashion-MNIST, with its published training and test sets.

    Returns:
        Inputs (N, 1, 28, 28), float32 in [0, 1]; labels (N,), int64, 0 to 9.

    Raises:
        DataNotFoundError: See :func:`bayes_svdo.data.fetch.obtain`.
        CorruptDataError: If a file is damaged, or does not belong to the others.
    """
    paths = obtain(IDX_SETS[name], root, progress=progress)
    x_train, y_train = _read_pair(name, paths, "train")
    x_test, y_test = _read_pair(name, paths, "t10k")
    return DataSet(name, x_train, y_train, x_test, y_test, num_classes=_NUM_CLASSES)


def _read_pair(name: str, paths: dict[str, Path], part: str) -> tuple[Tensor, Tensor]:
    image_path = paths[f"{part}-images-idx3-ubyte.gz"]
    label_path = paths[f"{part}-labels-idx1-ubyte.gz"]
    _refuse_another_set(name, f"{part}-labels-idx1-ubyte.gz", label_path)
    images, labels = read_idx(image_path, ndim=3), read_idx(label_path, ndim=1)
    if images.shape[1:] != (_SIDE, _SIDE):
        raise CorruptDataError(
            f"{image_path} holds images of {images.shape[1]} x {images.shape[2]} pixels; those "
            f"of {name!r} have {_SIDE} x {_SIDE}"
        )
    if len(images) != len(labels):
        raise CorruptDataError(
            f"{image_path} holds {len(images)} images, but {label_path} holds {len(labels)} labels"
        )
    if len(images) == 0:
        raise CorruptDataError(f"{image_path} holds no images")
    if int(labels.max()) >= _NUM_CLASSES:
        raise CorruptDataError(
            f"{label_path} holds the label {labels.max()}; those of {name!r} are 0 to "
            f"{_NUM_CLASSES - 1}"
        )
    x = torch.from_numpy(images.astype(np.float32)).div_(255).unsqueeze_(1)
    return x, torch.from_numpy(labels.astype(np.int64))


def _refuse_another_set(name: str, file: str, path: Path) -> None:
    """The sets name their files alike, so one can be taken for the other without a trace."""
    digest = pooch.file_hash(path, alg="sha256")
    for other, files in IDX_SETS.items():
        if other != name and digest == files.sha256.get(file):
            raise CorruptDataError(f"{path} is the file of {other!r}, not of {name!r}")
