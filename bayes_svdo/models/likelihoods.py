"""What the network's output says of the data: likelihoods with a plate of ``num_data`` points.

Each likelihood is called with the network's output, the targets or ``None``, and the number of data
points that the minibatch stands for. It opens ``pyro.plate("data", num_data)`` (so a batch of ``M``
points is scaled by ``num_data / M``) and samples the site ``"y"``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

_EXAMPLES_SHOWN = 5


class Likelihood(nn.Module, ABC):
    """``p(y | output)``, independent over data points.

    Attributes:
        metric: Name of what :meth:`score` measures.
        higher_is_better: Whether a larger score is a better one.
    """

    metric: str
    higher_is_better: bool

    @abstractmethod
    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """The distribution of ``y``, its batch shape that of ``output`` or a part of it."""

    @abstractmethod
    def score(self, output: Tensor, y: Tensor) -> Tensor:
        """The metric for each data point: ``output`` of shape ``(N, ...)`` to shape ``(N,)``."""

    @abstractmethod
    def check(self, y: Tensor, output: Tensor, name: str) -> None:
        """Refuse targets that this likelihood cannot score.

        Args:
            y: All targets, shape ``(N, ...)``.
            output: The network's output for the first few of them.
            name: What to call ``y`` in the message.

        Raises:
            TypeError: The dtype is wrong.
            ValueError: Shape or values are wrong.
        """

    def reduce(self, scores: Tensor) -> float:
        """The metric of a data set from the scores of its points, shape ``(N,)``."""
        return float(scores.mean())

    def mean(self, output: Tensor) -> Tensor:
        """The mean of ``y`` (class probabilities for a classifier), shape as ``output``'s."""
        mean: Tensor = self.distribution(output).mean
        return mean

    def forward(
        self, output: Tensor, y: Tensor | None, num_data: int, sample_dims: int = 0
    ) -> None:
        """Sample, or score, the site ``"y"``.

        Args:
            output: The network's output, shape ``(*samples, M, ...)``.
            y: Targets of shape ``(M, ...)``, or None to predict.
            num_data: Number of data points that the ``M`` of this batch stand for.
            sample_dims: Number of leading sample dimensions of ``output``.

        Raises:
            ValueError: ``y`` is not of the shape that goes with ``output``, or holds more points
                than ``num_data``.
        """
        if output.dtype in (torch.float16, torch.bfloat16):  # autocast's; no dtype for sums of logs
            output = output.float()
        with torch.autocast(output.device.type, enabled=False):
            self._observe(output, y, num_data, sample_dims)

    def _observe(self, output: Tensor, y: Tensor | None, num_data: int, sample_dims: int) -> None:
        likelihood = self.distribution(output)
        batch_size = output.shape[sample_dims]
        if y is not None and batch_size > num_data:
            raise ValueError(
                f"the batch holds {batch_size} data points, but num_data={num_data} is the size of "
                "the whole training set."
            )
        shape = likelihood.shape()[sample_dims:]
        if y is not None and y.shape != shape:  # would broadcast
            raise ValueError(
                f"y must have shape {tuple(shape)} to go with network outputs of shape "
                f"{tuple(output.shape)}, but has shape {tuple(y.shape)}."
            )
        # Only a scored batch stands for the data set; a predicted one stands for itself.
        size = batch_size if y is None else num_data
        # Dimensions after the batch (positions of a sequence, pixels) belong to one data point.
        event_dims = len(likelihood.batch_shape) - sample_dims - 1
        with pyro.plate("data", size, subsample=torch.arange(batch_size), dim=-1):
            pyro.sample("y", likelihood.to_event(event_dims), obs=y)


class Categorical(Likelihood):
    """Classes: the output holds logits, shape ``(M, ..., K)``; ``y`` integers in ``0..K-1``."""

    metric = "accuracy"
    higher_is_better = True

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Categorical with ``logits=output``."""
        return dist.Categorical(logits=output)

    def mean(self, output: Tensor) -> Tensor:
        """Class probabilities, shape ``(M, ..., K)``."""
        return output.softmax(-1)

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        """1 where the class of the largest logit is ``y``, mean over positions."""
        return _mean_over_outputs(output.argmax(-1) == y)

    def check(self, y: Tensor, output: Tensor, name: str) -> None:
        """Labels must be int64 of shape ``(N, ...)`` and lie in ``0..K-1``."""
        if y.dtype != torch.int64:
            raise TypeError(
                f"{name} holds class labels and must be int64, but its dtype is {y.dtype}.\n"
                f"  Try {name.split()[-1]}.long(), if its values are whole numbers."
            )
        if y.shape[1:] != output.shape[1:-1] and y.shape[1:] == output.shape[2:]:
            raise ValueError(
                f"{name} of shape {tuple(y.shape)} goes with classes in the last dimension of the "
                f"network's output, but that has shape {tuple(output.shape)}: in the second, it "
                "seems.\n  Try a module around the net that returns net(x).movedim(1, -1)."
            )
        _check_shape(y, output.shape[1:-1], output, name)
        num_classes = output.shape[-1]
        outside = (y < 0) | (y >= num_classes)
        if outside.any():
            raise ValueError(
                f"{name} holds labels outside 0..{num_classes - 1}, the classes of the network's "
                f"{num_classes} outputs: {_some(y[outside].unique())}. The first is that of data "
                f"point {int(outside.nonzero()[0, 0])}, counted from 0."
            )


class Bernoulli(Likelihood):
    """Two classes, or several independent ones: the output holds logits of the shape of ``y``."""

    metric = "accuracy"
    higher_is_better = True

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Bernoulli with ``logits=output``."""
        bernoulli: dist.TorchDistribution = dist.Bernoulli(logits=output)
        return bernoulli

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        """1 where the likelier class is ``y``, mean over outputs."""
        return _mean_over_outputs((output > 0) == (y > 0))

    def check(self, y: Tensor, output: Tensor, name: str) -> None:
        """Targets must be 0 or 1, floating point, of the shape of the output."""
        _check_floating(y, output, name)
        _check_shape(y, output.shape[1:], output, name)
        wrong = y[(y != 0) & (y != 1)].unique()
        if len(wrong):
            raise ValueError(f"{name} must hold 0 and 1 only, but holds {_some(wrong)}.")


class Gaussian(Likelihood):
    """Real targets with Gaussian noise.

    Args:
        scale: Standard deviation of the noise, in the units of ``y``: a positive number (known
            noise, or where to start if it is learned).
        noise: ``"known"``; ``"learned"``, one scale for all data, a point estimate; or
            ``"heteroscedastic"``: the last dimension of the output is twice that of ``y``, means
            first, then log variances.

    Raises:
        TypeError: ``scale`` is not a number.
        ValueError: ``scale`` is not positive, or ``noise`` is unknown.
    """

    metric = "RMSE"
    higher_is_better = False

    def __init__(
        self, scale: float = 1.0, noise: Literal["known", "learned", "heteroscedastic"] = "known"
    ) -> None:
        super().__init__()
        given: object = scale
        if isinstance(given, str) or not hasattr(given, "__float__"):
            raise TypeError(f"scale must be a positive number, but is {scale!r}.")
        if not scale > 0 or math.isinf(scale):
            raise ValueError(f"scale must be a positive number, but is {scale}.")
        if noise not in ("known", "learned", "heteroscedastic"):
            raise ValueError(
                f'noise must be "known", "learned" or "heteroscedastic", but is {noise!r}.'
            )
        self.noise = noise
        log_scale = torch.tensor(math.log(scale))
        if noise == "learned":
            self.log_scale: Tensor = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Normal around the output."""
        mean, scale = output, self.log_scale.exp()
        if self.noise == "heteroscedastic":
            mean, log_variance = _halves(output)
            scale = (0.5 * log_variance).exp()
        normal: dist.TorchDistribution = dist.Normal(mean, scale)
        return normal

    def score(self, output: Tensor, y: Tensor) -> Tensor:
        """Squared error, mean over outputs; :meth:`reduce` takes the root of their mean."""
        return _mean_over_outputs((self.mean(output) - y).square())

    def reduce(self, scores: Tensor) -> float:
        """Root mean squared error."""
        return float(scores.mean().sqrt())

    def check(self, y: Tensor, output: Tensor, name: str) -> None:
        """Targets must be floating point, of the shape of the output's means."""
        _check_floating(y, output, name)
        if self.noise == "heteroscedastic":
            output = _halves(output)[0]
        _check_shape(y, output.shape[1:], output, name)


def _halves(output: Tensor) -> tuple[Tensor, ...]:
    """Means and log variances."""
    if output.dim() < 2 or output.shape[-1] % 2:
        raise ValueError(
            "heteroscedastic noise needs an even last dimension of the network's output (means, "
            f"then log variances), but the output's shape is {tuple(output.shape)}."
        )
    return output.chunk(2, -1)


def _mean_over_outputs(scores: Tensor) -> Tensor:
    scores = scores if scores.is_floating_point() else scores.float()
    return scores.flatten(1).mean(1) if scores.dim() > 1 else scores


def _check_floating(y: Tensor, output: Tensor, name: str) -> None:
    if y.dtype != output.dtype:
        raise TypeError(
            f"{name} must have the dtype of the network's output, {output.dtype}, but has "
            f"{y.dtype}.\n"
            f"  Try {name.split()[-1]}.to({output.dtype})."
        )


def _check_shape(y: Tensor, event_shape: torch.Size, output: Tensor, name: str) -> None:
    if y.shape[1:] != event_shape:
        wanted = ", ".join(["N", *map(str, event_shape)]) + ("," if not event_shape else "")
        column = y.dim() == 1 and tuple(event_shape) == (1,)
        hint = f"\n  Try {name.split()[-1]}[:, None]." if column else ""
        raise ValueError(
            f"{name} must have shape ({wanted}) to go with network outputs of shape "
            f"{tuple(output.shape)}, but has shape {tuple(y.shape)}.{hint}"
        )


def _some(values: Tensor) -> str:
    shown = ", ".join(str(value) for value in values[:_EXAMPLES_SHOWN].tolist())
    return shown + (", ..." if len(values) > _EXAMPLES_SHOWN else "")
