"""The logistic losses behind L1 logistic regression, and the derivatives that its solvers need.

Every array is laid out features first: logits are ``(K, n)`` and the design is ``(D, n)``, so that
the columns of a working set are contiguous rows. ``K`` is the number of logits: the number of
classes, or one for two classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**24  # elements of a working set that are gathered at once: 128 MiB in float64


class AbstractLoss(ABC):
    """A sum of weighted log-losses as a function of logits ``(K, n)``.

    Attributes:
        labels: Class of each sample, ``(n,)``.
        target: Label indicators, ``(K, n)``.
        scale: Weight of each sample's log-loss, C times its sample weight, ``(n,)``.
    """

    def __init__(self, labels: Tensor, target: Tensor, scale: Tensor) -> None:
        self.labels = labels
        self.target = target
        self.scale = scale

    def rescaled(self, scale: Tensor) -> AbstractLoss:  # (n,)
        """The same loss with other sample weights."""
        return type(self)(self.labels, self.target, scale)

    @abstractmethod
    def value(self, logits: Tensor) -> Tensor:  # (K, n) -> ()
        """The loss in nats, summed over samples."""

    @abstractmethod
    def probabilities(self, logits: Tensor) -> Tensor:  # (K, n) -> (K, n)
        """Class probabilities, of the second class alone where there are two."""

    @abstractmethod
    def bregman(self, logits: Tensor, probs: Tensor, step: Tensor) -> Tensor:  # -> ()
        """``value(logits + step) - value(logits) - <gradient, step>``, exact for tiny steps too."""

    @abstractmethod
    def hessian(
        self,
        design: Tensor,  # (D, n)
        probs: Tensor,  # (K, n)
        classes: Tensor,  # (m,)
        features: Tensor,  # (m,)
    ) -> Tensor:  # (m, m)
        """Second derivatives for the cells ``(classes[i], features[i])``, sorted by class."""

    @abstractmethod
    def entropy(self, probs: Tensor) -> Tensor:  # (K, n) -> ()
        """The negative convex conjugate of the loss at ``probs - target``: a weighted entropy."""

    @abstractmethod
    def balance(self, probs: Tensor) -> Tensor:  # (K, n) -> (n,)
        """Factors in [0, 1], one per sample, that make the scaled residuals sum to zero."""


class BinaryLoss(AbstractLoss):
    """``log(1 + exp(z)) - t z`` for one logit and targets 0 and 1."""

    def value(self, logits: Tensor) -> Tensor:
        """Sum of the log-losses."""
        # Not softplus: torch rounds it off beyond 20, an error of 2e-9 per sample.
        return -(self.scale * F.logsigmoid(self._signs() * logits)).sum()

    def _signs(self) -> Tensor:  # -> (1, n)
        return 2.0 * self.target - 1.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of the second class."""
        return torch.sigmoid(logits)

    def bregman(self, logits: Tensor, probs: Tensor, step: Tensor) -> Tensor:
        """The loss beyond its tangent."""
        if bool((step.abs() < 1.0).all()):
            up, down = (1.0 - probs) * step, -probs * step  # the two logits, centred
            excess = probs * torch.expm1(up) + (1.0 - probs) * torch.expm1(down)
            return (self.scale * torch.log1p(excess)).sum()
        tangent = self.value(logits) + (self.scale * (probs - self.target) * step).sum()
        return self.value(logits + step) - tangent

    def hessian(self, design: Tensor, probs: Tensor, classes: Tensor, features: Tensor) -> Tensor:
        """Second derivatives of the cells."""
        root = (self.scale * probs * (1.0 - probs)).sqrt()
        out = design.new_zeros(len(features), len(features))
        for part in _chunks(design.shape[1], len(features)):
            rows = design[:, part][features] * root[:, part]
            out.addmm_(rows, rows.T)
        return out

    def entropy(self, probs: Tensor) -> Tensor:
        """The conjugate of the loss, negated."""
        entropy: Tensor = torch.special.entr(probs) + torch.special.entr(1.0 - probs)
        return (self.scale * entropy).sum()

    def balance(self, probs: Tensor) -> Tensor:
        """Factors per class, gathered by sample."""
        # What leaves one class for the other must come back, so each takes the other's total.
        leaves_second = (self.scale * self.target * (1.0 - probs)).sum()
        leaves_first = (self.scale * (1.0 - self.target) * probs).sum()
        alpha = torch.stack([leaves_second, leaves_first])
        alpha = alpha / alpha.max()
        return torch.where(torch.isfinite(alpha).all(), alpha, 1.0)[self.labels]


class MultinomialLoss(AbstractLoss):
    """``logsumexp(z) - z[label]`` for one logit per class."""

    def value(self, logits: Tensor) -> Tensor:
        """Sum of the log-losses."""
        return (self.scale * (logits.logsumexp(0) - (self.target * logits).sum(0))).sum()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probability of each class."""
        return torch.softmax(logits, 0)

    def bregman(self, logits: Tensor, probs: Tensor, step: Tensor) -> Tensor:
        """The loss beyond its tangent."""
        mean = (probs * step).sum(0)
        centred = step - mean
        if bool((centred.abs() < 1.0).all()):
            return (self.scale * torch.log1p((probs * torch.expm1(centred)).sum(0))).sum()
        tangent = logits.logsumexp(0) + mean
        return (self.scale * ((logits + step).logsumexp(0) - tangent)).sum()

    def hessian(self, design: Tensor, probs: Tensor, classes: Tensor, features: Tensor) -> Tensor:
        """Second derivatives of the cells."""
        counts = torch.bincount(classes, minlength=len(probs)).tolist()
        out = design.new_zeros(len(features), len(features))
        for part in _chunks(design.shape[1], len(features)):
            rows = design[:, part][features]
            mixed = rows * probs[:, part][classes]
            weighted = mixed * self.scale[part]
            out.addmm_(mixed, weighted.T, alpha=-1.0)
            start = 0
            for count in counts:
                block = slice(start, start + count)
                out[block, block].addmm_(rows[block], weighted[block].T)
                start += count
        return out

    def entropy(self, probs: Tensor) -> Tensor:
        """The conjugate of the loss, negated."""
        entropy: Tensor = torch.special.entr(probs)
        return (self.scale * entropy).sum()

    def balance(self, probs: Tensor) -> Tensor:
        """Factors per class, gathered by sample."""
        # Probability that leaves class l for class k must come back: alpha is the stationary
        # distribution of the chain whose flows are the off-diagonal entries.
        flow = (self.target * self.scale) @ probs.T
        flow.fill_diagonal_(0.0)
        system = torch.diag(flow.sum(1)) - flow.T
        system[-1] = 1.0
        right = torch.zeros_like(system[:, :1])
        right[-1] = 1.0
        alpha = torch.linalg.solve_ex(system, right)[0][:, 0]
        alpha = (alpha / alpha.max()).clamp(min=0.0)  # below zero by rounding only
        return torch.where(torch.isfinite(alpha).all(), alpha, 1.0)[self.labels]


def _chunks(n: int, width: int) -> list[slice]:
    """Slices of ``range(n)`` that keep a gathered ``(width, chunk)`` array small."""
    step = max(1, _CHUNK // max(width, 1))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]
