"""The convex problem behind L1 logistic regression: its scaling, its gradient, its duality gap.

The layout is that of the losses: logits ``(K, n)``, design ``(D, n)``, weights ``(K, D)``. The
intercept is one more row of ones whose penalty is zero, so hardly a formula treats it apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bayes_svdo.inference.l1_losses import AbstractLoss, BinaryLoss, MultinomialLoss
from bayes_svdo.inference.scales import power_of_2

_ROUNDING = 4.0  # of a sum over samples, in units of the last place


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The objective at one point.

    Attributes:
        logits: ``(K, n)``.
        probs: Probabilities, ``(K, n)``.
        residual: Gradient of the loss with respect to the logits, ``(K, n)``.
        gradient: Gradient of the loss with respect to the weights, ``(K, D)``.
        value: Loss plus penalty.
        gap: Duality gap, its rounding included: the objective is above its minimum by no more.
    """

    logits: Tensor
    probs: Tensor
    residual: Tensor
    gradient: Tensor
    value: float
    gap: float


@dataclass(frozen=True, eq=False)
class L1Problem:
    """``loss(weight @ design) + sum(penalty * |weight|)``.

    Attributes:
        design: Standardised features, and a last row of ones for the intercept, ``(D, n)``.
        penalty: Weight of ``|weight|`` per feature, zero for the intercept, ``(D,)``.
        loss: The smooth part.
        offset: Mean that was taken from each feature, ``(D,)``.
        spread: Scale that each feature was divided by, ``(D,)``.
        fit_intercept: Whether the last row of the design is the intercept.
    """

    design: Tensor
    penalty: Tensor
    loss: AbstractLoss
    offset: Tensor
    spread: Tensor
    fit_intercept: bool

    def with_scale(self, scale: Tensor) -> L1Problem:  # (n,)
        """The same problem with other weights of the samples."""
        return replace(self, loss=self.loss.rescaled(scale))

    def null_weight(self) -> Tensor:  # (K, D)
        """All weights zero and the intercept at its optimum, the log-frequencies of the classes."""
        target, scale = self.loss.target, self.loss.scale
        weight = target.new_zeros(len(target), len(self.design))
        if self.fit_intercept:
            share = (target * scale).sum(1) / scale.sum()
            binary = len(target) == 1
            log_share = torch.logit(share) if binary else share.log() - share.log().mean()
            weight[:, -1] = log_share
        return weight

    def evaluate(self, weight: Tensor) -> Evaluation:  # (K, D)
        """Value, gradient and duality gap.

        The dual point is the residual, scaled per class so that it sums to zero (the intercept's
        constraint) and then as a whole so that no feature's correlation exceeds its penalty. Both
        steps keep it between the labels and the probabilities, where the dual is an entropy; the
        gap is therefore an upper bound at every point, not only near the optimum.
        """
        loss = self.loss
        logits = weight @ self.design
        probs = loss.probabilities(logits)
        residual = loss.scale * (probs - loss.target)
        gradient = residual @ self.design.T
        value = loss.value(logits) + (self.penalty * weight.abs()).sum()
        shrink, correlation = torch.ones_like(loss.scale), gradient
        if self.fit_intercept:
            shrink = loss.balance(probs)
            correlation = (residual * shrink) @ self.design.T
        gaps = [value - self._dual(probs, shrink, correlation, self.penalty)]
        # No correlation can be held below a penalty that is less than its rounding. There the bound
        # is that of a penalty larger by the rounding, whose minimum is above ours by no more than
        # the rounding times our weights at the minimum; those are taken for at most twice these.
        rounding = self._rounding_of_correlations(probs)
        doubt = 2.0 * rounding * weight[:, : self.num_penalised].abs().sum()
        gaps.append(value - self._dual(probs, shrink, correlation, self.penalty + rounding) + doubt)
        total, strict, loose = torch.stack([value, *(gap.clamp(min=0.0) for gap in gaps)]).tolist()
        # No difference of two sums is known better than their rounding.
        gap = min(strict, loose) + _ROUNDING * torch.finfo(value.dtype).eps * total
        return Evaluation(logits, probs, residual, gradient, total, gap)

    def _dual(
        self, probs: Tensor, shrink: Tensor, correlation: Tensor, penalty: Tensor
    ) -> Tensor:  # (K, n), (n,), (K, D), (D,) -> ()
        """The dual objective where the residual, shrunk, correlates no more than the penalty."""
        num = self.num_penalised
        if num:
            excess = (correlation[:, :num].abs() / penalty[:num]).amax()
            shrink = shrink / excess.clamp(min=1.0)
        return self.loss.entropy(self.loss.target + shrink * (probs - self.loss.target))

    def _rounding_of_correlations(self, probs: Tensor) -> Tensor:  # (K, n) -> ()
        """Of the standardised features with the residual, by Cauchy and Schwarz."""
        scale = self.loss.scale
        largest = scale.amax()  # whose square may overflow
        # A probability of 1 has an error of 1 unit in the last place, whatever it is less a target.
        norm: Tensor = largest * ((scale / largest) * probs).norm()
        return _ROUNDING * torch.finfo(probs.dtype).eps * math.sqrt(len(scale)) * norm

    @property
    def num_penalised(self) -> int:
        """Number of features, without the intercept."""
        return len(self.penalty) - int(self.fit_intercept)

    def relative(self, gradient: Tensor) -> Tensor:  # (K, D) -> (K, num_penalised)
        """``|gradient|`` in units of the penalty: above one, a zero weight wants to leave zero."""
        return gradient[:, : self.num_penalised].abs() / self.penalty[: self.num_penalised]


def standardised_problem(
    x: Tensor,  # (n, D)
    labels: Tensor,  # (n,)
    scale: Tensor,  # (n,)
    num_classes: int,
    fit_intercept: bool,
) -> L1Problem:
    """Rescale the features so that the problem is well conditioned; its optimum stays the same.

    A weight of a feature that was divided by ``spread`` is penalised by ``1 / spread``. Features
    are centred where an intercept can absorb it. A feature that is constant to rounding becomes
    zero, and so does its weight: the intercept does the same for free.
    """
    n, num_features = x.shape
    rows = num_features + int(fit_intercept)
    design = x.new_ones(rows, n)
    offset, spread = x.new_zeros(rows), x.new_ones(rows)
    penalty = x.new_zeros(rows)
    if num_features:
        features = design[:num_features]
        features.copy_(x.T)
        info = torch.finfo(x.dtype)
        size = features.abs().amax(1)
        # Dividing by it rounds nothing, and squares neither overflow nor underflow.
        unit = power_of_2(size)
        dead = size < info.tiny / info.eps
        unit = torch.where(dead, 1.0, unit)
        features /= unit[:, None]
        if fit_intercept:
            for _ in range(2):  # the second pass removes the rounding of the first mean
                mean = features.mean(1)
                features -= mean[:, None]
                offset[:num_features] += unit * mean
            dead |= features.abs().amax(1) <= 16.0 * info.eps  # of values between 1 and 2
        features[dead] = 0.0
        root = torch.where(dead, 1.0, features.square().mean(1).sqrt())
        features /= root[:, None]
        spread[:num_features] = unit * root
        penalty[:num_features] = 1.0 / spread[:num_features]
    loss: AbstractLoss
    if num_classes == 2:
        loss = BinaryLoss(labels, labels.to(x.dtype)[None], scale)
    else:
        loss = MultinomialLoss(labels, F.one_hot(labels, num_classes).T.to(x.dtype), scale)
    return L1Problem(design, penalty, loss, offset, spread, fit_intercept)
