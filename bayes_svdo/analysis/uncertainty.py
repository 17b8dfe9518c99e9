"""What a posterior predicts, and how sure it is: predictive distributions in bounded memory.

``p(y | x) = ∫ p(y | net(x; w)) q(w) dw`` by one of three methods:

- ``"weights"``: draws of all weights, each used for all rows: draws are functions of ``x``.
- ``"local"``: draws by local reparameterization, as in training. Rows of ``x`` are drawn
  independently, so a draw is no function of ``x``; so are the positions of a convolution and the
  tokens of a sequence: what pools over them is said to be surer than it is.
- ``"moments"``: means and variances in one pass (:mod:`bayes_svdo.analysis.moments`); an
  approximation, for networks of linear layers and ReLU.

Uncertainty is split into what more data would not remove (aleatoric) and what they would
(epistemic): entropy = expected entropy + mutual information for classes (Depeweg et al. (2018),
https://arxiv.org/abs/1710.07283), variance = mean variance + variance of the mean for regression.
It is uncertainty under ``q``, which under the log-uniform prior approximates no proper posterior.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from bayes_svdo._names import unknown_name
from bayes_svdo.analysis.figures import check_posterior
from bayes_svdo.analysis.moments import Moments, draws_by_moments, output_moments
from bayes_svdo.analysis.predictives import (
    ClassificationPredictive,
    RegressionPredictive,
)
from bayes_svdo.distributions.undrawn import LocalReparameterization, WeightReused
from bayes_svdo.inference.arguments import check_count, check_seed
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.inputs import inputs_of
from bayes_svdo.inference.posterior import (
    Posterior,
    _evaluating,
    _explained,
    local_parameters,
)
from bayes_svdo.inference.surroundings import random_state
from bayes_svdo.models import BayesianNetwork, Bernoulli, Categorical, Gaussian
from bayes_svdo.models.likelihoods import Likelihood

__all__ = ["ClassificationPredictive", "Method", "RegressionPredictive", "predictive"]

Method = Literal["local", "weights", "moments"]
# Number of a draw, the rows it is for, the network's output for them.
_Outputs = Iterator[tuple[int, slice, Tensor]]


@torch.no_grad()
def predictive(
    posterior: Posterior,
    x: Any,
    num_samples: int = 100,
    method: Method = "weights",
    batch_size: int = 1000,
    seed: int | None = None,
    *,
    threshold: float | None = None,
    keep_draws: bool = False,
) -> ClassificationPredictive | RegressionPredictive:
    """The distribution of ``y`` given ``x``, weights integrated over the posterior.

    How sure it is, it is by ``q``, the fitted guide. Under the log-uniform prior there is no proper
    posterior for ``q`` to approximate (Hron et al. (2018), https://arxiv.org/abs/1807.01969), so
    check the result on data (:mod:`bayes_svdo.analysis.calibration`).

    Sums are kept in float64. Memory grows with the size of the result only: class probabilities
    are summed over draws, not kept. (For regression the outputs of all draws make up the result.)

    Args:
        posterior: Of a :class:`~bayes_svdo.models.BayesianNetwork` with a ``Categorical``,
            ``Bernoulli`` or ``Gaussian`` likelihood.
        x: Inputs of shape ``(N, ...)``, or a tuple of such; finite.
        num_samples: Draws. For ``"moments"``: draws of Gaussian logits, over which softmax is
            averaged (as Kendall & Gal (2017), eq. 12, https://arxiv.org/abs/1703.04977); regression
            needs none.
        method: ``"weights"``, ``"local"`` or ``"moments"``, see the module.
        batch_size: Inputs taken at a time, of all draws together, which bounds the memory.
        seed: For the draws; torch's global generators are left as they were. None to go on with
            those. Draws of ``"local"`` and ``"moments"`` depend on ``batch_size``, too.
        threshold: Weights with ``log alpha >= threshold`` are zero in every draw. None prunes
            nothing that was not pruned while training: pruned weights hold little information,
            but the noise on them is part of the posterior.
        keep_draws: Whether to keep the class probabilities of every draw, ``S`` times the memory
            (for regression the draws are kept anyway).

    Returns:
        By the likelihood: a :class:`ClassificationPredictive` or a :class:`RegressionPredictive`,
        on the posterior's device.

    Raises:
        TypeError: The model is no ``BayesianNetwork``, its likelihood is another one, or its net is
            none that ``"moments"`` can take.
        ValueError: ``num_samples`` or ``batch_size`` is below 1, ``method`` is unknown, ``x`` is
            empty, has NaN or does not fit the network, or the network's output is not finite.
        MemoryError: There is no room for the draws of a regression.
    """
    check_posterior(posterior, "predictive")
    network = posterior._network("predictive")
    likelihood = network.likelihood
    if not isinstance(likelihood, (Categorical, Bernoulli, Gaussian)):
        raise TypeError(
            "predictive needs a Categorical, Bernoulli or Gaussian likelihood, but the model's is "
            f"a {type(likelihood).__name__}.\n  Try posterior.predict(x, num_samples=...)."
        )
    num_samples = check_count("num_samples", num_samples)
    batch_size = check_count("batch_size", batch_size)
    if method not in get_args(Method):
        raise unknown_name("method", method, get_args(Method))
    seed = check_seed(seed)
    inputs = inputs_of(x)
    if threshold is not None:
        posterior = posterior._pruned(threshold)
    size = len(inputs[0])
    with random_state(seed, posterior.device), _evaluating(network), local_parameters():
        if isinstance(likelihood, Gaussian) and method == "moments":
            batches = posterior._split(_one_input(inputs), batch_size)
            return _regression_by_moments(
                likelihood, (output_moments(posterior, batch) for (batch,) in batches)
            )
        outputs = {
            "local": _outputs_by_local_reparameterization,
            "weights": _outputs_by_weights,
            "moments": _outputs_by_moments,
        }[method](posterior, inputs, num_samples, batch_size)
        if isinstance(likelihood, Gaussian):
            return _regression(likelihood, outputs, num_samples, size, method)
        return _classification(likelihood, outputs, num_samples, size, method, keep_draws)


# Outputs of the network, draw by draw.


def _outputs_by_local_reparameterization(
    posterior: Posterior, x: tuple[Tensor, ...], num_samples: int, batch_size: int
) -> _Outputs:
    network = posterior._network("predictive")
    reused = set(posterior.drawn)
    start = 0
    for batch in posterior._split(x, batch_size):
        rows = slice(start, start + len(batch[0]))
        for index in range(num_samples):
            with _explained(x, posterior.dtype):
                output = _draw(posterior.guide, network, batch, reused)
            yield index, rows, output
        start = rows.stop


def _draw(
    guide: AdditiveNoiseGuide, network: BayesianNetwork, batch: tuple[Tensor, ...], reused: set[str]
) -> Tensor:
    """One draw of the output; ``reused`` collects weights that are used twice."""
    # Not the model: it would draw targets, too.
    while True:
        with LocalReparameterization(reused):
            weights = guide()
        try:
            return network.output(weights, batch)
        except WeightReused as error:
            reused.add(error.name)


def _outputs_by_weights(
    posterior: Posterior, x: tuple[Tensor, ...], num_samples: int, batch_size: int
) -> _Outputs:
    for draws, rows, several in posterior._drawn_outputs(x, num_samples, batch_size):
        for index, output in zip(range(draws.start, draws.stop), several, strict=True):
            yield index, rows, output


def _outputs_by_moments(
    posterior: Posterior, x: tuple[Tensor, ...], num_samples: int, batch_size: int
) -> _Outputs:
    """Draws of outputs with the mean and the covariance of moment propagation."""
    start = 0
    for (batch,) in posterior._split(_one_input(x), batch_size):
        rows = slice(start, start + len(batch))
        for index, output in enumerate(draws_by_moments(posterior, batch, num_samples)):
            yield index, rows, output
        start = rows.stop


def _one_input(x: tuple[Tensor, ...]) -> tuple[Tensor]:
    if len(x) > 1:
        raise TypeError(f'method "moments" takes networks of one input, but x has {len(x)}.')
    return (x[0],)


# From outputs to distributions.


def _log_probabilities(likelihood: Likelihood, output: Tensor) -> Tensor:
    """Shape ``(n, ..., K)``; two classes in the last dimension for ``Bernoulli``."""
    logits = output.double()  # before, not after: log_softmax in float32 has an error of 1e-7
    if isinstance(likelihood, Bernoulli):
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1)
    return logits.log_softmax(-1)


def _classification(
    likelihood: Likelihood,
    outputs: _Outputs,
    num_samples: int,
    size: int,
    method: Method,
    keep_draws: bool,
) -> ClassificationPredictive:
    log_sums = expected_entropy = draws = None
    for index, rows, output in outputs:
        log_p = _log_probabilities(likelihood, output)
        p = log_p.exp()
        if log_sums is None or expected_entropy is None:
            log_sums = log_p.new_full((size, *log_p.shape[1:]), -math.inf)
            expected_entropy = log_p.new_zeros(log_sums.shape[:-1])
            draws = _room(log_p, (num_samples, *log_sums.shape)) if keep_draws else None
        log_sums[rows] = torch.logaddexp(log_sums[rows], log_p)
        expected_entropy[rows] -= (p * log_p).where(p > 0, 0.0).sum(-1)  # 0 log 0 is 0
        if draws is not None:
            draws[index, rows] = p
    assert log_sums is not None
    assert expected_entropy is not None
    _check_output(~log_sums.isnan())
    return ClassificationPredictive(
        log_sums - math.log(num_samples),
        expected_entropy / num_samples,
        method,
        num_samples,
        draws,
    )


def _regression(
    likelihood: Gaussian, outputs: _Outputs, num_samples: int, size: int, method: Method
) -> RegressionPredictive:
    kept: Tensor | None = None
    for index, rows, output in outputs:
        if kept is None:
            kept = _room(output, (num_samples, size, *output.shape[1:]))
        kept[index, rows] = output.double()
    assert kept is not None
    _check_output(kept.isfinite().all(0))
    means, scales = _normal(likelihood, kept)
    return RegressionPredictive(
        means.mean(0),
        scales.square().mean(0).expand(means.shape[1:]),
        means.var(0, correction=0),  # of the mixture, no estimate from a sample
        means,
        scales,
        method,
        num_samples,
    )


def _room(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for all draws, in float64."""
    try:
        return like.new_empty(shape, dtype=torch.float64)
    except RuntimeError as error:
        raise MemoryError(
            f"num_samples={shape[0]} draws for {shape[1]} data points take "
            f"{math.prod(shape) * 8 / 2**30:.3g} GiB."
        ) from error


def _normal(likelihood: Gaussian, output: Tensor) -> tuple[Tensor, Tensor]:
    """Means, and standard deviations of the noise, of shape ``(1, ...)`` if they are all one."""
    normal = likelihood.distribution(output)
    if likelihood.noise == "heteroscedastic":
        return normal.mean, normal.stddev
    scale = likelihood.log_scale.double().exp().to(output.device)
    return normal.mean, scale.reshape((1,) * output.dim())


def _regression_by_moments(
    likelihood: Gaussian, batches: Iterator[Moments]
) -> RegressionPredictive:
    """A Gaussian with the mixture's mean and variance.

    Log variances that are outputs, too, are taken for Gaussian and independent of the means, and
    the noise has the mean of their log-normal variance.
    """
    mean, variance = (torch.cat(parts) for parts in zip(*batches, strict=True))
    _check_output(mean.isfinite() & variance.isfinite())
    mean, scale = _normal(likelihood, mean)
    aleatoric = scale.square()
    if likelihood.noise == "heteroscedastic":
        variance, variance_of_log = variance.chunk(2, -1)
        aleatoric = aleatoric * (0.5 * variance_of_log).exp()
    aleatoric = aleatoric.expand(mean.shape)
    scale = (aleatoric + variance).sqrt()
    return RegressionPredictive(mean, aleatoric, variance, mean[None], scale[None], "moments", 1)


def _check_output(good: Tensor) -> None:
    """Refuse outputs of which ``good``, shape ``(N, ...)``, is not true."""
    rows = ~good.flatten(1).all(1) if good.dim() > 1 else ~good
    if rows.any():
        raise ValueError(
            f"the network's output is NaN or infinite for {int(rows.sum())} of {len(rows)} inputs, "
            f"the first at index {int(rows.nonzero()[0])}."
        )
