"""The mathematics: the priors that prune, the posterior, and the divergence between them.

This folder knows no network and no training loop. Importing it registers the divergences with
``torch.distributions.kl_divergence``, which is all that Pyro needs.
"""

from bayes_svdo.distributions.additive_noise import AdditiveNoiseNormal
from bayes_svdo.distributions.empirical_bayes import EmpiricalBayes
from bayes_svdo.distributions.kl import kl_empirical_bayes, kl_log_uniform, log_alpha
from bayes_svdo.distributions.log_uniform import LogUniform
from bayes_svdo.distributions.truncated import TruncatedLogUniform
from bayes_svdo.distributions.undrawn import LocalReparameterization, UndrawnSample, WeightReused

__all__ = [
    "AdditiveNoiseNormal",
    "EmpiricalBayes",
    "LocalReparameterization",
    "LogUniform",
    "TruncatedLogUniform",
    "UndrawnSample",
    "WeightReused",
    "kl_empirical_bayes",
    "kl_log_uniform",
    "log_alpha",
]
