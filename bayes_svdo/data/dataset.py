"""A data set: two pairs of tensors and what one must know to model them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class DataSet:
    """A training and a test set, as tensors.

    Attributes:
        name: What the set is called in tables and run records.
        x_train: Training inputs, (N, features) or, for images, (N, channels, height, width).
        y_train: Training targets, (N,): int64 class labels, or floating-point for regression.
        x_test: Test inputs, shaped like ``x_train``.
        y_test: Test targets, shaped like ``y_train``.
        num_classes: The number of classes; None for regression.
        feature_names: One name per column of a (N, features) input, where columns have names.

    Raises:
        ValueError: If the tensors disagree in shape or device, are empty, hold NaN or infinity,
            or hold labels outside ``[0, num_classes)``.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int | None = None
    feature_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            self._check_pair(part, getattr(self, f"x_{part}"), getattr(self, f"y_{part}"))
        if self.x_train.shape[1:] != self.x_test.shape[1:]:
            raise ValueError(
                f"data set {self.name!r}: one row of x_train has shape "
                f"{tuple(self.x_train.shape[1:])}, one row of x_test {tuple(self.x_test.shape[1:])}"
            )
        if self.feature_names is not None and (len(self.feature_names),) != self.x_train.shape[1:]:
            raise ValueError(
                f"data set {self.name!r}: {len(self.feature_names)} feature_names for rows of "
                f"shape {tuple(self.x_train.shape[1:])}; expected one name per column"
            )

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        """The pair ``(x_train, y_train)``."""
        return self.x_train, self.y_train

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        """The pair ``(x_test, y_test)``."""
        return self.x_test, self.y_test

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(channels, height, width) of one input, or None if the inputs are not images."""
        if self.x_train.ndim != 4:
            return None
        _, channels, height, width = self.x_train.shape
        return channels, height, width

    def with_validation_split(self, num_validation: int, seed: int) -> DataSet:
        """Hold out a random part of the training set, to choose hyperparameters with.

        The returned set's *test* set is the held-out part, and its training set is the rest;
        the true test set is not in it, so nothing chosen on it can have seen the test data.
        Rows are drawn without replacement and without regard to their class.

        Args:
            num_validation: Rows to hold out, from 1 to one less than the training set has.
            seed: Seed of the draw; the same seed holds out the same rows on every device.

        Returns:
            A data set named ``"<name>-validation"``.

        Raises:
            ValueError: If ``num_validation`` leaves nothing to validate on or to train with.
        """
        num_validation, num_train = operator.index(num_validation), len(self.x_train)
        if not 1 <= num_validation < num_train:
            raise ValueError(
                f"num_validation must be between 1 and {num_train - 1}, one less than the "
                f"training rows of {self.name!r}; got {num_validation}"
            )
        generator = torch.Generator().manual_seed(operator.index(seed))
        order = torch.randperm(num_train, generator=generator).to(self.x_train.device)
        held_out, kept = order[:num_validation], order[num_validation:]
        return replace(
            self,
            name=f"{self.name}-validation",
            x_train=self.x_train[kept],
            y_train=self.y_train[kept],
            x_test=self.x_train[held_out],
            y_test=self.y_train[held_out],
        )

    def __repr__(self) -> str:
        task = "regression" if self.num_classes is None else f"{self.num_classes} classes"
        shape = tuple(self.x_train.shape[1:])
        return (
            f"DataSet({self.name!r}, {len(self.x_train)} train, {len(self.x_test)} test, "
            f"inputs {shape}, {task})"
        )

    def _check_pair(self, part: str, x: Tensor, y: Tensor) -> None:
        where = f"data set {self.name!r}"
        if x.ndim < 2 or y.ndim != 1 or len(x) != len(y) or len(x) == 0:
            raise ValueError(
                f"{where}: expected x_{part} of shape (N, ...) and y_{part} of shape (N,) with "
                f"N >= 1; got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if x.device != y.device:
            raise ValueError(f"{where}: x_{part} is on {x.device}, y_{part} on {y.device}")
        for argument, values in ((f"x_{part}", x), (f"y_{part}", y)):
            if values.is_floating_point() and not bool(values.isfinite().all()):
                raise ValueError(f"{where}: {argument} holds NaN or infinite values")
        if self.num_classes is None:
            if not y.is_floating_point():
                raise ValueError(
                    f"{where}: y_{part} is {y.dtype}; regression (num_classes=None) needs "
                    "floating-point targets, classification needs num_classes"
                )
            return
        if y.dtype != torch.int64:
            raise ValueError(f"{where}: y_{part} is {y.dtype}; class labels must be torch.int64")
        lowest, highest = int(y.min()), int(y.max())
        if lowest < 0 or highest >= self.num_classes:
            raise ValueError(
                f"{where}: y_{part} has labels from {lowest} to {highest}; expected "
                f"0 to {self.num_classes - 1}"
            )
