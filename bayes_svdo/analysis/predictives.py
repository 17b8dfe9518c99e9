"""Predictive distributions of classes and of real targets: what they can be asked.

:func:`bayes_svdo.analysis.predictive` makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayes_svdo.inference.arguments import check_count, check_seed
from bayes_svdo.inference.inputs import as_tensor
from bayes_svdo.inference.surroundings import random_state

# Numbers in a temporary tensor over all draws and some of the rows.
_CHUNK = 2**20
_MAX_STEPS = 200  # of the search for quantiles, which takes about ten


@dataclass(frozen=True, eq=False)
class ClassificationPredictive:
    """Class probabilities, averaged over the posterior, and how they vary. Entropies are in nats.

    Attributes:
        log_probabilities: Log of the mean class probabilities, shape ``(N, ..., K)``, float64. For
            a ``Bernoulli`` likelihood ``K`` is 2, added to the shape of the network's output.
        expected_entropy: Mean entropy of the draws, the aleatoric part, shape ``(N, ...)``.
        method: As given to :func:`~bayes_svdo.analysis.predictive`.
        num_samples: Number of draws ``S``.
        draws: Class probabilities of every draw, shape ``(S, N, ..., K)``, if they were kept.
    """

    log_probabilities: Tensor
    expected_entropy: Tensor
    method: str
    num_samples: int
    draws: Tensor | None = None

    def __repr__(self) -> str:
        shape = tuple(self.log_probabilities.shape)
        return (
            f"ClassificationPredictive(probabilities of shape {shape}, {self.num_samples} draws by "
            f'"{self.method}"; means in nats: entropy {float(self.entropy.mean()):.3g}, mutual '
            f"information {float(self.mutual_information.mean()):.3g})"
        )

    @property
    def probabilities(self) -> Tensor:
        """Mean class probabilities, shape ``(N, ..., K)``."""
        return self.log_probabilities.exp()

    @property
    def entropy(self) -> Tensor:
        """Entropy of the mean probabilities, the total uncertainty, shape ``(N, ...)``."""
        p = self.probabilities
        return -(p * self.log_probabilities).where(p > 0, 0.0).sum(-1)  # 0 log 0 is 0

    @property
    def mutual_information(self) -> Tensor:
        """Between class and weights, the epistemic part, shape ``(N, ...)``.

        Entropy minus expected entropy, which is never negative (Jensen); a difference that is, by
        rounding (about 1e-16), is given as zero. From ``S`` draws it comes out too low, by
        about ``(K - 1) / (2 S)`` at most.
        """
        return (self.entropy - self.expected_entropy).clamp(min=0)

    def predict(self) -> Tensor:
        """The most probable class, int64, shape ``(N, ...)``."""
        return self.log_probabilities.argmax(-1)

    def log_density(self, y: Any) -> Tensor:
        """Log predictive probability of the labels ``y`` in nats, shape ``(N, ...)``.

        Raises:
            TypeError: Labels are not whole numbers.
            ValueError: ``y`` is not of shape ``(N, ...)``, or not within ``0..K-1``.
        """
        labels = check_labels(y, self.log_probabilities)
        return self.log_probabilities.gather(-1, labels[..., None])[..., 0]

    def draw(self, num_samples: int = 1, seed: int | None = None) -> Tensor:
        """Labels drawn independently for each row, int64, shape ``(num_samples, N, ...)``."""
        num_samples = check_count("num_samples", num_samples)
        p = self.probabilities
        with random_state(check_seed(seed), p.device):
            drawn = p.flatten(0, -2).multinomial(num_samples, replacement=True)
        return drawn.T.reshape(num_samples, *p.shape[:-1])


@dataclass(frozen=True, eq=False)
class RegressionPredictive:
    """A mixture of Gaussians for every target, one for each draw, in the units of ``y``; float64.

    Attributes:
        mean: Shape ``(N, ...)``, that of ``y``.
        aleatoric_variance: Mean variance of the noise, shape ``(N, ...)``.
        epistemic_variance: Variance of the mean over draws, shape ``(N, ...)``.
        component_means: Shape ``(S, N, ...)``, what the network says in every draw.
        component_scales: Standard deviations, broadcastable to ``component_means``.
        method: As given to :func:`~bayes_svdo.analysis.predictive`. For ``"moments"`` there is one
            component, which has the total variance.
        num_samples: Number of draws ``S``.
    """

    mean: Tensor
    aleatoric_variance: Tensor
    epistemic_variance: Tensor
    component_means: Tensor
    component_scales: Tensor
    method: str
    num_samples: int

    def __repr__(self) -> str:
        aleatoric, epistemic = self.aleatoric_variance.mean(), self.epistemic_variance.mean()
        shape = tuple(self.mean.shape)
        return (
            f"RegressionPredictive(mean of shape {shape}, {self.num_samples} draws by "
            f'"{self.method}"; mean variance: aleatoric {float(aleatoric):.3g}, epistemic '
            f"{float(epistemic):.3g})"
        )

    @property
    def variance(self) -> Tensor:
        """Total variance, the sum of both parts, shape ``(N, ...)``."""
        return self.aleatoric_variance + self.epistemic_variance

    @property
    def std(self) -> Tensor:
        """Root of the total variance, shape ``(N, ...)``."""
        return self.variance.sqrt()

    def predict(self) -> Tensor:
        """The mean, shape ``(N, ...)``."""
        return self.mean

    def log_density(self, y: Any, *, joint: bool = False) -> Tensor:
        """Log predictive density at ``y``, the log of the mean over draws, shape ``(N, ...)``.

        In nats, of a density per unit of ``y``.

        Args:
            y: Targets, of the shape of :attr:`mean`.
            joint: Of all targets of a data point together, shape ``(N,)``; else of each for itself.
                Targets of one data point are dependent: they share the draws of the weights.

        Raises:
            ValueError: ``y`` is not of the shape of :attr:`mean`, or not finite.
        """

        def log_density(means: Tensor, scales: Tensor, y: Tensor) -> Tensor:
            log_densities = -0.5 * ((y - means) / scales).square() - scales.log()
            log_densities = log_densities - 0.5 * math.log(2 * math.pi)
            if joint:
                log_densities = log_densities.flatten(1).unflatten(1, (len(y), -1)).sum(-1)
            return log_densities.logsumexp(0) - math.log(len(means))

        return self._by_rows(log_density, self._targets(y))

    def cdf(self, y: Any) -> Tensor:
        """``P(target <= y)``, shape ``(N, ...)``: the probability integral transform of ``y``.

        Uniform over the data if the predictive distribution is right.

        Raises:
            ValueError: ``y`` is not of the shape of :attr:`mean`, or not finite.
        """
        return self._by_rows(_cdf, self._targets(y))

    def quantile(self, q: float | Sequence[float]) -> Tensor:
        """Quantiles of the mixture, to about 1e-12 of its scale.

        Args:
            q: A probability, or several in a sequence or an array, inside of (0, 1).

        Returns:
            Shape ``(N, ...)``, or ``(len(q), N, ...)`` if several were given.

        Raises:
            ValueError: ``q`` is not inside of (0, 1).
        """
        probabilities = torch.as_tensor(q, dtype=torch.float64)
        if probabilities.dim():
            if not len(probabilities):
                raise ValueError("q is empty.")
            return torch.stack([self.quantile(float(each)) for each in probabilities])
        p = check_probability("q", float(probabilities))
        return self._by_rows(lambda means, scales, _: _quantile(means, scales, p), self.mean)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Lower and upper end of the central interval that holds ``level`` of the probability.

        Returns:
            Two tensors of shape ``(N, ...)``.

        Raises:
            ValueError: ``level`` is not inside of (0, 1).
        """
        check_probability("level", level)
        return self.quantile(0.5 - 0.5 * level), self.quantile(0.5 + 0.5 * level)

    def draw(self, num_samples: int = 1, seed: int | None = None) -> Tensor:
        """Targets drawn, shape ``(num_samples, N, ...)``.

        Each takes one draw of the network for all rows, and noise for each row: with
        ``method="weights"``, it is a function of ``x`` plus noise.
        """
        num_samples = check_count("num_samples", num_samples)
        means = self.component_means
        shape = (num_samples, *means.shape[1:])
        with random_state(check_seed(seed), means.device):
            chosen = torch.randint(len(means), (num_samples,), device=means.device)
            noise = torch.randn(shape, dtype=means.dtype, device=means.device)
        scales = self.component_scales
        return means[chosen] + (scales[chosen] if len(scales) > 1 else scales) * noise

    def _targets(self, y: Any) -> Tensor:
        targets = as_tensor(y, "y").to(self.mean)
        if targets.shape != self.mean.shape:
            raise ValueError(
                f"y must have shape {tuple(self.mean.shape)}, but has shape {tuple(targets.shape)}."
            )
        return targets

    def _by_rows(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], y: Tensor) -> Tensor:
        """``function(means, scales, y)`` for some rows at a time, which bounds the memory."""
        step = max(1, _CHUNK * len(y) // self.component_means.numel())
        scales = self.component_scales
        parts = []
        for start in range(0, len(y), step):
            rows = slice(start, start + step)
            some = scales if scales.shape[1] == 1 else scales[:, rows]
            parts.append(function(self.component_means[:, rows], some, y[rows]))
        return torch.cat(parts)


def _cdf(means: Tensor, scales: Tensor, y: Tensor) -> Tensor:
    below: Tensor = torch.special.ndtr((y - means) / scales)
    return below.mean(0)


def _quantile(means: Tensor, scales: Tensor, q: float) -> Tensor:
    """Newton's method in a bracket, bisected where a step leaves it or does not get shorter."""
    ends = means + scales * torch.special.ndtri(means.new_tensor(q))
    low, high = ends.amin(0), ends.amax(0)  # the mixture's lies between those of its parts
    smallest = scales.amin(0)
    y: Tensor = 0.5 * (low + high)
    change = high - low
    for _ in range(_MAX_STEPS):
        z = (y - means) / scales
        excess = torch.special.ndtr(z).mean(0) - q
        low, high = torch.where(excess < 0, y, low), torch.where(excess < 0, high, y)
        density = ((-0.5 * z.square()).exp() / scales).mean(0) / math.sqrt(2 * math.pi)
        newton = y - excess / density
        good = (newton >= low) & (newton <= high) & ((newton - y).abs() <= 0.5 * change)
        new = torch.where(good, newton, 0.5 * (low + high))
        change = (new - y).abs()
        y = new
        if bool((change <= 1e-12 * (smallest + y.abs())).all()):
            break
    return y


def check_probability(name: str, value: float) -> float:
    """``value``, if it lies inside of (0, 1).

    Raises:
        ValueError: It does not.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, but is {value}.")
    return float(value)


def check_labels(y: Any, probabilities: Tensor) -> Tensor:
    """Labels as int64 on the device of ``probabilities``, shape ``(N, ..., K)``.

    Raises:
        TypeError: They are not whole numbers.
        ValueError: ``y`` is not of shape ``(N, ...)``, or not within ``0..K-1``.
    """
    given = as_tensor(y, "y").to(probabilities.device)
    fractions = given.is_floating_point() and not bool((given == given.round()).all())
    if fractions or given.is_complex():
        raise TypeError(f"y must hold class labels, whole numbers, but is of dtype {given.dtype}.")
    shape, num_classes = probabilities.shape[:-1], probabilities.shape[-1]
    if given.shape != shape:
        raise ValueError(f"y must have shape {tuple(shape)}, but has shape {tuple(given.shape)}.")
    labels = given.long()
    wrong = labels[(labels < 0) | (labels >= num_classes)].unique()
    if len(wrong):
        shown = ", ".join(map(str, wrong[:5].tolist())) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(f"y holds labels outside 0..{num_classes - 1}: {shown}.")
    return labels
