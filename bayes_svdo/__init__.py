"""Sparse variational dropout as probabilistic programming.

A network whose weights carry a log-uniform prior is a Pyro model; its guide is additive Gaussian
noise; fitting it by SVI prunes it; everything after that reads the fitted posterior.
"""

from importlib.metadata import version

from bayes_svdo.distributions import AdditiveNoiseNormal, EmpiricalBayes, LogUniform
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior, TraceAnalyticKL_ELBO, fit
from bayes_svdo.models import BayesianNetwork

__version__ = version("bayes-svdo")

__all__ = [
    "AdditiveNoiseGuide",
    "AdditiveNoiseNormal",
    "BayesianNetwork",
    "EmpiricalBayes",
    "LogUniform",
    "Posterior",
    "TraceAnalyticKL_ELBO",
    "__version__",
    "fit",
]
