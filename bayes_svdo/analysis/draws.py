"""Draws of all weights of a posterior, and what the network says of data at each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bayes_svdo.analysis.uncertainty import _check_output
from bayes_svdo.inference.inputs import as_tensor, inputs_of
from bayes_svdo.inference.posterior import Posterior, _evaluating, _explained, local_parameters
from bayes_svdo.inference.surroundings import random_state
from bayes_svdo.models import BayesianNetwork

_CHUNK = 2**22  # numbers drawn at a time
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Draws by site, each of shape (draws, n), see SiteDraws.
Drawn = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class SiteDraws:
    """Weights of one site, as they are drawn from the posterior.

    Attributes:
        name: Of the site.
        shape: Of the weight.
        axes: What its dimensions are, such as ``("unit", "input")``.
        loc: Means of the weights that are drawn, shape ``(n,)``; the others are zero.
        sigma: Their standard deviations, zero for a point mass.
        log_alpha: Their log alpha.
        kept: Which of them are not pruned at the threshold.
        index: Where they are in the weight, flattened, shape ``(n,)``; None if all are drawn, or
            the weight is a scalar, which has no places.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    loc: Tensor
    sigma: Tensor
    log_alpha: Tensor
    kept: Tensor
    index: Tensor | None

    @staticmethod
    @torch.no_grad()
    def of(posterior: Posterior, threshold: float, surviving_only: bool) -> tuple[SiteDraws, ...]:
        """Every site, in the model's order.

        Args:
            posterior: Of any model.
            threshold: On log alpha: a weight that is not pruned there survives.
            surviving_only: Whether the others are zero, and not drawn.
        """
        log_alphas, pruned = posterior.log_alpha(), posterior.guide.is_pruned(threshold)
        return tuple(
            _site(posterior, name, log_alphas[name], ~pruned[name], surviving_only)
            for name in posterior.guide.sites
        )

    def __len__(self) -> int:
        return self.loc.numel()

    def draw(self, number: int) -> Tensor:
        """``number`` draws, shape ``(number, n)``."""
        shape = (number, len(self))
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return torch.addcmul(self.loc, self.sigma, noise)

    def draw_into_memory(self, number: int) -> NDArray[np.float32]:
        """``number`` draws, shape ``(number, n)``, some at a time, which spares the device."""
        result = np.empty((number, len(self)), np.float32)
        step = max(1, _CHUNK // len(self))
        for start in range(0, number, step):
            block = self.draw(min(step, number - start))
            result[start : start + step] = block.float().cpu().numpy()
        return result

    def weight(self, values: Tensor) -> Tensor:
        """The whole weight that has ``values``, shape ``(n,)``, where it is drawn."""
        values = values.to(self.loc)
        if self.index is None:
            return values.reshape(self.shape)
        full = self.loc.new_zeros(self.shape)
        full.view(-1)[self.index] = values
        return full


def _site(
    posterior: Posterior, name: str, log_alpha: Tensor, kept: Tensor, surviving_only: bool
) -> SiteDraws:
    loc, log_sigma2 = posterior.guide.parameters_of(name)
    sigma = (0.5 * log_sigma2).exp().masked_fill(log_alpha.isposinf(), 0.0)  # pruned for good
    alone = loc.dim() == 0 and bool(kept)
    index = kept.flatten().nonzero().flatten() if surviving_only and not alone else None
    loc_, sigma_, log_alpha_, kept_ = (
        value.flatten() if index is None else value.flatten()[index]
        for value in (loc, sigma, log_alpha, kept)
    )
    axes = _axes(posterior, name, loc.dim())
    return SiteDraws(name, tuple(loc.shape), axes, loc_, sigma_, log_alpha_, kept_, index)


def _axes(posterior: Posterior, name: str, dims: int) -> tuple[str, ...]:
    """What the dimensions of a site's weight are."""
    model = posterior.model
    if not isinstance(model, BayesianNetwork) or dims < 2:
        return tuple(f"dim_{index}" for index in range(dims))
    kernel = tuple(f"kernel_{index}" for index in range(dims - 2))
    layer = model.layer_of(name)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
        return ("token", "feature")
    return (("input", "unit") if isinstance(layer, _TRANSPOSED) else ("unit", "input")) + kernel


class Predictions(NamedTuple):
    """What the network says at every draw of the weights.

    Attributes:
        y: A draw of the targets for each, shape ``(draws, N, ...)``, float32 or int32.
        log_likelihood: Of every data point in nats, shape ``(draws, N)``, float64; None without
            targets.
    """

    y: NDArray[Any]
    log_likelihood: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class DrawnData:
    """Data that a posterior predicts, draw by draw.

    Attributes:
        posterior: Of a :class:`~bayes_svdo.models.BayesianNetwork`.
        x: Inputs, each of shape ``(N, ...)``.
        y: Targets of shape ``(N, ...)`` on the posterior's device, or None.
        y_shape: Shape of one target.
        discrete: Whether targets are whole numbers.
    """

    posterior: Posterior
    x: tuple[Tensor, ...]
    y: Tensor | None
    y_shape: tuple[int, ...]
    discrete: bool

    @staticmethod
    @torch.no_grad()
    def of(
        posterior: Posterior, sites: Sequence[SiteDraws], x: Any, y: Any, purpose: str
    ) -> DrawnData:
        """Data checked against the network.

        Raises:
            TypeError: The model is no ``BayesianNetwork``, or ``y`` has the wrong dtype.
            ValueError: The network cannot take ``x``, its output is not finite or has not a row for
                each input, or ``y`` does not go with it.
        """
        network = posterior._network(purpose)
        inputs = inputs_of(x)
        means = {site.name: site.weight(site.loc) for site in sites}
        with _evaluating(network), local_parameters(), _explained(inputs, sites[0].loc.dtype):
            first = next(posterior._split(tuple(value[:2] for value in inputs), 2))
            output = _floating(network.output(means, first))
        _check_output(output.isfinite())
        target = network.likelihood.distribution(output)
        discrete = bool(getattr(target.support, "is_discrete", False))
        if y is not None:
            y = as_tensor(y, "y").to(posterior.device)
            # Floats of another precision, or whole numbers of another size, are no mistake.
            with random_state(0, posterior.device):  # which stays as it was
                dtype = target.sample().dtype
            if y.is_floating_point() == dtype.is_floating_point:
                y = y.to(dtype)
            if len(y) != len(inputs[0]):
                raise ValueError(f"x has {len(inputs[0])} data points, but y has {len(y)}.")
            # Messages show the shape of all outputs.
            network.likelihood.check(y, output[:1].expand(len(y), *output.shape[1:]), "y")
        return DrawnData(posterior, inputs, y, tuple(target.shape()[1:]), discrete)

    def __len__(self) -> int:
        return len(self.x[0])

    @torch.no_grad()
    def predict(
        self, sites: Sequence[SiteDraws], drawn: Drawn, draws: int, batch_size: int
    ) -> Predictions:
        """Targets, and their log likelihood, at every draw of the weights.

        Neither depends on ``batch_size``, but for the rounding errors of the network's output.

        Args:
            sites: Every site of the network.
            drawn: Draws that are there already; of other sites new ones are drawn, and not kept.
            draws: How many there are.
            batch_size: Inputs taken at a time. All outputs of one draw are in memory at once.

        Raises:
            ValueError: The network's output is not finite.
        """
        network = self.posterior._network("predict")
        y = np.empty((draws, len(self), *self.y_shape), np.int32 if self.discrete else np.float32)
        scores = None if self.y is None else np.empty((draws, len(self)))
        # A seed for each draw: how many random numbers a target takes may hang on the output.
        seeds = torch.randint(2**63 - 1, (draws,)).tolist()
        with _evaluating(network), local_parameters():
            for index, seed in enumerate(seeds):
                with random_state(seed, self.posterior.device):
                    weights = {
                        site.name: site.weight(
                            torch.from_numpy(drawn[site.name][index])
                            if site.name in drawn
                            else site.draw(1)[0]
                        )
                        for site in sites
                    }
                    output = self._output(network, weights, batch_size)
                    for rows, targets, score in self._targets(network, output):
                        y[index, rows] = targets.cpu().numpy()
                        if scores is not None and score is not None:
                            scores[index, rows] = score.cpu().numpy()
        return Predictions(y, scores)

    def _targets(
        self, network: BayesianNetwork, output: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Targets drawn, and the log likelihood of the true ones, of some rows at a time."""
        # Not by batches, in which random numbers would come to other rows.
        step = max(1, _CHUNK // output[0].numel())
        for start in range(0, len(output), step):
            rows = slice(start, start + step)
            drawn = network.likelihood.distribution(output[rows]).sample()
            score = None
            if self.y is not None:
                # In float32 a sure class has likelihood 1 in every draw: no tail for PSIS.
                target = network.likelihood.distribution(output[rows].double())
                # Positions of a sequence, pixels: they belong to one data point.
                score = target.to_event(len(target.batch_shape) - 1).log_prob(self.y[rows])
            yield rows, drawn, score

    def _output(
        self, network: BayesianNetwork, weights: dict[str, Tensor], batch_size: int
    ) -> Tensor:
        with _explained(self.x, self.posterior.dtype):
            parts = [
                _floating(network.output(weights, batch))
                for batch in self.posterior._split(self.x, batch_size)
            ]
        output = torch.cat(parts)
        _check_output(output.isfinite())
        return output


def _floating(output: Tensor) -> Tensor:
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
