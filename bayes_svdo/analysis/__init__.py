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
from bayes_svdo.analysis.nuts import NutsPosterior, NutsWarning, nuts_posterior
from bayes_svdo.analysis.nuts_comparison import (
    MarginalComparison,
    NutsComparison,
    compare_with_nuts,
)
from bayes_svdo.analysis.plots import plot_log_alpha, plot_training
from bayes_svdo.analysis.posterior_plots import (
    plot_marginals,
    plot_relevance,
    plot_weight_uncertainty,
)
from bayes_svdo.analysis.predictives import ClassificationPredictive, RegressionPredictive
from bayes_svdo.analysis.psis import psis_khat
from bayes_svdo.analysis.reference_plots import (
    plot_nuts_marginal,
    plot_nuts_marginals,
    plot_sbc_ranks,
)
from bayes_svdo.analysis.sbc import SimulatedCalibration, simulation_based_calibration
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
    "MarginalComparison",
    "Moments",
    "NutsComparison",
    "NutsPosterior",
    "NutsWarning",
    "RegressionPredictive",
    "RegressionScores",
    "Reliability",
    "RiskCoverage",
    "SimulatedCalibration",
    "Snapshot",
    "Snapshots",
    "SparsityTable",
    "animate_sparsification",
    "brier_score",
    "classification_scores",
    "compare_with_nuts",
    "expected_calibration_error",
    "interval_coverage",
    "negative_log_likelihood",
    "nuts_posterior",
    "ood_auroc",
    "output_moments",
    "pit_distance",
    "plot_log_alpha",
    "plot_marginals",
    "plot_nuts_marginal",
    "plot_nuts_marginals",
    "plot_predictive_bands",
    "plot_relevance",
    "plot_reliability",
    "plot_risk_coverage",
    "plot_sbc_ranks",
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
    "simulation_based_calibration",
    "sparsity_table",
    "to_arviz",
]
