"""How posteriors are found: the automatic guide, the objective, and ``fit``."""

from bayes_svdo.inference.elbo import ELBOTerms, TraceAnalyticKL_ELBO
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.history import History
from bayes_svdo.inference.posterior import Posterior
from bayes_svdo.inference.schedules import ConstantThenLinear, KLWarmup
from bayes_svdo.inference.svi import EpochEnd, NonFiniteObjectiveError, fit

__all__ = [
    "AdditiveNoiseGuide",
    "ConstantThenLinear",
    "ELBOTerms",
    "EpochEnd",
    "History",
    "KLWarmup",
    "NonFiniteObjectiveError",
    "Posterior",
    "TraceAnalyticKL_ELBO",
    "fit",
]
