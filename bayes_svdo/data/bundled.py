"""The sets that come with scikit-learn, and so need neither files nor a network.

scikit-learn does not divide them, so a fixed part is held out here: a fifth of the rows,
drawn by ``train_test_split`` with ``random_state=0``.
"""

from __future__ import annotations

import torch

from bayes_svdo.data.dataset import DataSet

_SPLIT = {"test_size": 0.2, "random_state": 0}


def load_digits() -> DataSet:
    """Handwritten digits of 8 x 8 pixels: 1,437 to train with, 360 to test, stratified by class.

    The rows are shuffled before they are divided. In the published order whole runs come from
    one writer, so that a division without shuffling tests other writers and is harder: compare
    accuracies only between like divisions.

    Source: Alpaydin & Kaynak (1998), UCI "Optical recognition of handwritten digits".

    Returns:
        Inputs (N, 1, 8, 8), float32, the published counts 0 to 16 divided by 16;
        labels (N,), int64, 0 to 9.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = datasets.load_digits()
    x = torch.from_numpy(bunch.images).to(torch.float32).div_(16).unsqueeze_(1)
    y = torch.from_numpy(bunch.target).to(torch.int64)
    train, test = train_test_split(range(len(y)), stratify=bunch.target, **_SPLIT)
    return DataSet("digits", x[train], y[train], x[test], y[test], num_classes=10)


def load_diabetes() -> DataSet:
    """Diabetes progression after a year from ten baseline measurements: 353 to train, 89 to test.

    Source: Efron, Hastie, Johnstone & Tibshirani (2004), Least angle regression.

    Returns:
        Inputs (N, 10) in their own units (years, kg/m², mmHg, ...: neither centred nor scaled)
        and targets (N,), both float64.
    """
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    bunch = datasets.load_diabetes(scaled=False)
    x, y = torch.from_numpy(bunch.data), torch.from_numpy(bunch.target)
    train, test = train_test_split(range(len(y)), **_SPLIT)
    return DataSet(
        "diabetes", x[train], y[train], x[test], y[test], feature_names=tuple(bunch.feature_names)
    )
