"""How posteriors are found: the automatic guide, the objective, ``fit``, and the ARD toolkit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bayes_svdo.inference.compiled import CompiledObjective, UntraceableError, compile_objective
from bayes_svdo.inference.elbo import ELBOTerms, TraceAnalyticKL_ELBO
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.history import History
from bayes_svdo.inference.posterior import Posterior
from bayes_svdo.inference.schedules import ConstantThenLinear, KLWarmup
from bayes_svdo.inference.svi import EpochEnd, NonFiniteObjectiveError, fit

if TYPE_CHECKING:
    from bayes_svdo.inference.estimators import (
        L1LogisticRegression,
        RVMClassifier,
        RVMRegressor,
        VDARDClassifier,
        VDARDRegressor,
    )
    from bayes_svdo.inference.exact_regression import (
        DegenerateObjectiveError,
        NoiseCollapseWarning,
        VDARDRegression,
        fit_vdard_regression,
    )
    from bayes_svdo.inference.l1 import (
        L1LogisticFit,
        fit_l1_logistic,
        l1_logistic_path,
        l1_min_c,
    )
    from bayes_svdo.inference.l1_cross_validation import L1CrossValidation, cross_validate_l1
    from bayes_svdo.inference.relevance_vector_machine import (
        RVMClassification,
        RVMRegression,
        fit_rvm_classification,
        fit_rvm_regression,
    )

# scikit-learn takes half as long to import as torch: the toolkit is loaded when it is asked for.
_TOOLKIT = {
    "estimators": (
        "L1LogisticRegression",
        "RVMClassifier",
        "RVMRegressor",
        "VDARDClassifier",
        "VDARDRegressor",
    ),
    "exact_regression": (
        "DegenerateObjectiveError",
        "NoiseCollapseWarning",
        "VDARDRegression",
        "fit_vdard_regression",
    ),
    "l1": ("L1LogisticFit", "fit_l1_logistic", "l1_logistic_path", "l1_min_c"),
    "l1_cross_validation": ("L1CrossValidation", "cross_validate_l1"),
    "relevance_vector_machine": (
        "RVMClassification",
        "RVMRegression",
        "fit_rvm_classification",
        "fit_rvm_regression",
    ),
}
_MODULE_OF = {name: module for module, names in _TOOLKIT.items() for name in names}

__all__ = [
    "AdditiveNoiseGuide",
    "CompiledObjective",
    "ConstantThenLinear",
    "DegenerateObjectiveError",
    "ELBOTerms",
    "EpochEnd",
    "History",
    "KLWarmup",
    "L1CrossValidation",
    "L1LogisticFit",
    "L1LogisticRegression",
    "NoiseCollapseWarning",
    "NonFiniteObjectiveError",
    "Posterior",
    "RVMClassification",
    "RVMClassifier",
    "RVMRegression",
    "RVMRegressor",
    "TraceAnalyticKL_ELBO",
    "UntraceableError",
    "VDARDClassifier",
    "VDARDRegression",
    "VDARDRegressor",
    "compile_objective",
    "cross_validate_l1",
    "fit",
    "fit_l1_logistic",
    "fit_rvm_classification",
    "fit_rvm_regression",
    "fit_vdard_regression",
    "l1_logistic_path",
    "l1_min_c",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
