"""Sparse variational dropout as probabilistic programming.

A network whose weights carry a log-uniform prior is a Pyro model; its guide is additive Gaussian
noise; fitting it by SVI prunes it; everything after that reads the fitted posterior.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bayes_svdo.distributions import AdditiveNoiseNormal, EmpiricalBayes, LogUniform
    from bayes_svdo.inference import AdditiveNoiseGuide, Posterior, TraceAnalyticKL_ELBO, fit
    from bayes_svdo.models import BayesianNetwork

    __version__: str

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

# The command starts here, too: torch and Pyro take seconds to import, and come when asked for.
_MODULE_OF = {
    "AdditiveNoiseGuide": "inference",
    "AdditiveNoiseNormal": "distributions",
    "BayesianNetwork": "models",
    "EmpiricalBayes": "distributions",
    "LogUniform": "distributions",
    "Posterior": "inference",
    "TraceAnalyticKL_ELBO": "inference",
    "fit": "inference",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("bayes-svdo")
    elif name in _MODULE_OF:
        value = getattr(import_module(f"bayes_svdo.{_MODULE_OF[name]}"), name)
    elif name in _MODULE_OF.values():
        return import_module(f"bayes_svdo.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULE_OF.values()})
