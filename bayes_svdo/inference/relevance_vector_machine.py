"""The relevance vector machine: Bayesian regression and classification with few weights.

Every basis function has a weight with its own prior precision; the evidence decides which
precisions are finite (Tipping, 2001). Found by the fast algorithm of Tipping and Faul (2003), on
any device, in time and memory that grow with the number of basis functions in use.

    machine = fit_rvm_regression(x, y, kernel="rbf", gamma=0.5)
    mean, std = machine.predict(x_new, return_std=True)
    machine.relevance                                   # indices of the relevance vectors

The parts: :mod:`~.rvm_basis` (kernels), :mod:`~.rvm_evidence` (the evidence of a few weights and
its maximum), :mod:`~.rvm_search` (which weights), :mod:`~.rvm_fixed_point` (the older updates),
:mod:`~.rvm_laplace` (the logistic likelihood), :mod:`~.rvm_posterior` (what was found).
"""

from __future__ import annotations

from bayes_svdo.inference.rvm_classification import (
    LogisticRVM,
    RVMClassification,
    fit_rvm_classification,
)
from bayes_svdo.inference.rvm_regression import (
    NoiseBoundWarning,
    RVMRegression,
    fit_rvm_regression,
)

__all__ = [
    "LogisticRVM",
    "NoiseBoundWarning",
    "RVMClassification",
    "RVMRegression",
    "fit_rvm_classification",
    "fit_rvm_regression",
]
