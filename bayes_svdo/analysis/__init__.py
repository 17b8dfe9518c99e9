"""What a fitted posterior says: how sparse it is, what it predicts and how sure it is, pictures.

Conformal prediction, which needs MAPIE, is in :mod:`bayes_svdo.analysis.conformal`.
"""

from bayes_svdo.analysis.animation import animate_sparsification
from bayes_svdo.analysis.calibration import (
    ClassificationScores,
    RegressionScores,
    Reliability,
    brier_score,
    classification_scores,
    expected_calibration_error,
    interval_coverage,
    negative_log_likelihood,
    pit_distance,
    regression_scores,
    reliability,
)
from bayes_svdo.analysis.moments import Moments, output_moments
from bayes_svdo.analysis.plots import plot_log_alpha, plot_training
from bayes_svdo.analysis.posterior_plots import (
    plot_marginals,
    plot_relevance,
    plot_weight_uncertainty,
)
from bayes_svdo.analysis.predictives import ClassificationPredictive, RegressionPredictive
from bayes_svdo.analysis.psis import psis_khat
from bayes_svdo.analysis.selective import RiskCoverage, ood_auroc, risk_coverage
from bayes_svdo.analysis.snapshots import Snapshot, Snapshots
from bayes_svdo.analysis.sparsity import LayerSparsity, SparsityTable, sparsity_table
from bayes_svdo.analysis.to_arviz import to_arviz
from bayes_svdo.analysis.uncertainty import predictive
from bayes_svdo.analysis.uncertainty_plots import (
    plot_predictive_bands,
    plot_reliability,
    plot_risk_coverage,
    plot_uncertain_images,
)
from bayes_svdo.analysis.weight_images import plot_weights, plot_weights_before_after

__all__ = [
    "ClassificationPredictive",
    "ClassificationScores",
    "LayerSparsity",
    "Moments",
    "RegressionPredictive",
    "RegressionScores",
    "Reliability",
    "RiskCoverage",
    "Snapshot",
    "Snapshots",
    "SparsityTable",
    "animate_sparsification",
    "brier_score",
    "classification_scores",
    "expected_calibration_error",
    "interval_coverage",
    "negative_log_likelihood",
    "ood_auroc",
    "output_moments",
    "pit_distance",
    "plot_log_alpha",
    "plot_marginals",
    "plot_predictive_bands",
    "plot_relevance",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_training",
    "plot_uncertain_images",
    "plot_weight_uncertainty",
    "plot_weights",
    "plot_weights_before_after",
    "predictive",
    "psis_khat",
    "regression_scores",
    "reliability",
    "risk_coverage",
    "sparsity_table",
    "to_arviz",
]
