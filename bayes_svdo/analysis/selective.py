"""Whether uncertainty tells what to trust: selective prediction and strange inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bayes_svdo.analysis.figures import Array, array
from bayes_svdo.inference.inputs import as_tensor


@dataclass(frozen=True, eq=False)
class RiskCoverage:
    """Mean loss of the predictions that are kept, if the most uncertain are left out.

    Attributes:
        coverage: ``1/N, 2/N, ..., 1``, the part that is kept, shape ``(N,)``.
        risk: Mean loss of that part, shape ``(N,)``.
    """

    coverage: Array
    risk: Array

    def __repr__(self) -> str:
        return f"RiskCoverage({len(self.risk):,} predictions, AURC {self.area:.3g})"

    @property
    def area(self) -> float:
        """Mean risk over all coverages (AURC; Geifman, Uziel & El-Yaniv (2019))."""
        return float(self.risk.mean())

    def at(self, coverage: float) -> float:
        """Risk where (at least) a part ``coverage`` of the predictions is kept.

        Raises:
            ValueError: ``coverage`` is not in (0, 1].
        """
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage must lie in (0, 1], but is {coverage}.")
        # Coverages are k / N: a part of 0.3 of ten is three, whatever 0.3 * 10 rounds to.
        return float(self.risk[np.searchsorted(self.coverage, coverage - 1e-9)])


def risk_coverage(uncertainty: Any, loss: Any) -> RiskCoverage:
    """Risk against coverage of selective prediction.

    El-Yaniv & Wiener (2010), "On the foundations of noise-free selective classification"; Geifman
    & El-Yaniv (2017), https://arxiv.org/abs/1705.08500. Predictions of equal uncertainty are kept
    in random order: each stands with their mean loss, so the order of the data is of no account.

    Args:
        uncertainty: Of each prediction, such as its entropy, shape ``(N,)``, or
            ``(N, 1)`` of a net of one output.
        loss: Of each prediction, such as 1 where it is wrong, or its squared error; of the
            same shapes.

    Raises:
        TypeError: One is no tensor or array.
        ValueError: Lengths differ, shapes are others or ``N`` is 0, or a value is not finite.
    """
    u, losses = _vector(uncertainty, "uncertainty"), _vector(loss, "loss")
    if len(u) != len(losses):
        raise ValueError(
            f"uncertainty and loss must be of one length, but have {len(u)} and {len(losses)}."
        )
    _, group = np.unique(u, return_inverse=True)  # by ascending uncertainty
    count = np.bincount(group)
    losses = np.repeat(np.bincount(group, weights=losses) / count, count)
    kept = np.arange(1, len(u) + 1)
    return RiskCoverage(kept / len(u), np.cumsum(losses) / kept)


def ood_auroc(inside: Any, outside: Any) -> float:
    """How well uncertainty tells inputs from outside of the data from those inside.

    The probability that an input from outside is the more uncertain one (ties count a half):
    scikit-learn's area under the ROC curve; 0.5 is chance (Hendrycks & Gimpel (2017),
    https://arxiv.org/abs/1610.02136).

    Args:
        inside: Uncertainty (entropy, mutual information, ...) of inputs like the training data's,
            shape ``(N,)`` or ``(N, 1)``.
        outside: Of other inputs, shape ``(M,)`` or ``(M, 1)``.

    Raises:
        TypeError: One is no tensor or array.
        ValueError: One is empty, of another shape, or holds a value that is not finite.
    """
    from sklearn.metrics import roc_auc_score

    scores = _vector(inside, "inside"), _vector(outside, "outside")
    labels = np.repeat([0, 1], [len(score) for score in scores])
    return float(roc_auc_score(labels, np.concatenate(scores)))


def _vector(value: Any, name: str) -> Array:
    values = array(as_tensor(value, name))
    if not values.size or values.size != len(values):
        raise ValueError(f"{name} must have shape (N,), N at least 1, but has {values.shape}.")
    return values.ravel()
