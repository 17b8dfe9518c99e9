"""What a network says at draws of its weights, several draws at once where it allows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from bayes_svdo.distributions import AdditiveNoiseNormal
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.models import BayesianNetwork

# Bounds on what is in memory at once: draws, and the weights of all of them.
_MOST_DRAWS = 64
_MOST_WEIGHTS = 2**23


@torch.no_grad()
def outputs_at_draws(
    network: BayesianNetwork,
    guide: AdditiveNoiseGuide,
    batches: Callable[[], Iterable[tuple[Tensor, ...]]],
    num_samples: int,
    most_rows: int,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The network's outputs, each draw one function of all inputs.

    Args:
        network: In evaluation mode.
        guide: Where weights are drawn from.
        batches: Gives the inputs, some at a time; called once per group of draws.
        num_samples: Number of draws.
        most_rows: As many rows go through the network at once, those of all draws together, but
            no less than a batch.

    Yields:
        Which draws, which inputs, and their outputs, shape ``(draws, inputs, ...)``.
    """
    posteriors = {
        name: AdditiveNoiseNormal(*guide.parameters_of(name), validate_args=False)
        for name in guide.sites
    }
    num_weights = sum(q.loc.numel() for q in posteriors.values())
    # Not by the size of batches, on which the random numbers would then depend.
    step = max(1, min(_MOST_DRAWS, _MOST_WEIGHTS // max(1, num_weights)))
    at_once = _at_once(network, most_rows)
    for start in range(0, num_samples, step):
        draws = slice(start, min(start + step, num_samples))
        size = draws.stop - draws.start
        weights = {name: q.rsample(torch.Size((size,))) for name, q in posteriors.items()}
        first = 0
        for batch in batches():
            rows = slice(first, first + len(batch[0]))
            yield draws, rows, at_once(weights, batch)
            first = rows.stop


def _at_once(network: BayesianNetwork, most_rows: int) -> Callable[..., Tensor]:
    """The outputs at several draws: by ``torch.vmap``, or one by one where that cannot be."""
    vectorised = True

    def call(weights: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        nonlocal vectorised
        chunk = min(most_rows // len(batch[0]), len(next(iter(weights.values()))))
        if vectorised and chunk > 1:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # of operations that vmap loops over
                    return _vmapped(network, weights, batch, chunk)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever it is, a loop shows whether the network can be called
                vectorised = False
        names, values = weights.keys(), zip(*weights.values(), strict=True)
        draws = (dict(zip(names, draw, strict=True)) for draw in values)
        return torch.stack([network.output(draw, batch) for draw in draws])

    return call


def _vmapped(
    network: BayesianNetwork, weights: dict[str, Tensor], batch: tuple[Tensor, ...], chunk: int
) -> Tensor:
    def one(values: dict[str, Tensor]) -> Tensor:
        return network.output(values, batch)

    outputs: Tensor = torch.vmap(one, randomness="different", chunk_size=chunk)(weights)
    return outputs
