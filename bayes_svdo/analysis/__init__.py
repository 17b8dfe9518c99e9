"""What a fitted posterior says: how sparse it is, and pictures of it and of its training."""

from bayes_svdo.analysis.animation import animate_sparsification
from bayes_svdo.analysis.plots import plot_log_alpha, plot_training
from bayes_svdo.analysis.snapshots import Snapshot, Snapshots
from bayes_svdo.analysis.sparsity import LayerSparsity, SparsityTable, sparsity_table
from bayes_svdo.analysis.weight_images import plot_weights, plot_weights_before_after

__all__ = [
    "LayerSparsity",
    "Snapshot",
    "Snapshots",
    "SparsityTable",
    "animate_sparsification",
    "plot_log_alpha",
    "plot_training",
    "plot_weights",
    "plot_weights_before_after",
    "sparsity_table",
]
