"""Training curves and histograms of log alpha: what they show, checked against the numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bayes_svdo.analysis import plot_log_alpha, plot_training
from bayes_svdo.inference import AdditiveNoiseGuide, History, Posterior
from bayes_svdo.models import BayesianNetwork, Categorical, dense

EPOCHS = 10
SITES = ("fc1.weight", "fc2.weight")


def column(table, name):
    return [row[name] for row in table]


def lines(ax):
    return [line.get_ydata().tolist() for line in ax.lines]


# Training curves.


def test_curves_are_the_columns_of_the_history(rows):
    table = rows()
    nll, kl, error, sparsity = plot_training(table).axes
    assert lines(nll) == [column(table, "nll"), column(table, "validation_nll")]
    assert lines(kl) == [column(table, "kl")]
    np.testing.assert_allclose(
        lines(error),
        [[50 / e for e in range(1, EPOCHS + 1)], [60 / e for e in range(1, EPOCHS + 1)]],
        rtol=1e-12,  # 100 * (1 - accuracy), rounded
    )
    assert lines(sparsity) == [column(table, f"sparsity/{site}") for site in SITES]
    for ax in (nll, kl, error, sparsity):
        for line in ax.lines:
            assert line.get_xdata().tolist() == column(table, "epoch")


def test_every_panel_says_what_it_shows_and_in_which_unit(rows):
    axes = plot_training(rows()).axes
    assert [ax.get_ylabel() for ax in axes] == [
        "NLL (nats per data point)",
        "KL (nats)",
        "error (%)",
        "sparsity (%)",
    ]
    assert all(ax.get_title(loc="left") for ax in axes)
    assert [ax.get_xlabel() for ax in axes[2:]] == ["epoch", "epoch"]
    named = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert named == ["training, noisy", "validation, pruned"]
    layers = [text.get_text() for text in axes[3].get_legend().get_texts()]
    assert layers == ["fc1: 90.0 %", "fc2: 90.9 %"]


def test_the_title_says_what_came_out(rows):
    table = rows()
    assert plot_training(table).get_suptitle() == (
        "Compressed 101x after 10 epochs, validation error 6.0 %"
    )
    table[-1]["compression"] = math.inf
    assert plot_training(table).get_suptitle().startswith("No weight left after 10 epochs")
    table = rows("rmse")
    assert plot_training(table).get_suptitle().endswith("validation RMSE 0.94")


def test_rmse_takes_the_place_of_the_error_and_a_model_without_metric_has_no_such_panel(rows):
    table = rows("rmse", validation=False)
    _, _, error, _ = plot_training(table).axes
    assert error.get_ylabel() == "RMSE (units of y)"
    assert lines(error) == [column(table, "rmse")]
    figure = plot_training(rows(metric=None))
    assert len(figure.axes) == 3
    assert figure.get_suptitle() == "Compressed 101x after 10 epochs"
    assert [ax.get_xlabel() for ax in figure.axes] == 3 * ["epoch"]


@pytest.mark.parametrize(("warmup_end", "shaded"), [(4, (1, 4)), (100, (1, 10)), (1, None)])
def test_epochs_before_the_kl_has_full_weight_are_shaded(warmup_end, shaded, rows):
    for ax in plot_training(rows(warmup_end=warmup_end)).axes:
        spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
        assert spans == ([] if shaded is None else [shaded])
    legend = plot_training(rows(warmup_end=warmup_end)).axes[1].get_legend()
    assert (legend is not None) == (shaded is not None)


def test_a_layer_without_any_weight_is_on_the_page(rows):
    table = rows()
    table[-1]["sparsity/fc1.weight"] = 100.0
    ax = plot_training(table).axes[3]
    line = ax.lines[0]
    shown = ax.transAxes.inverted().transform(ax.transData.transform(line.get_xydata()))
    assert np.isfinite(shown).all()
    assert shown[-1, 1] == pytest.approx(1.0, abs=1e-9)
    assert np.all(np.diff(shown[:, 1]) > 0)


def test_sparsity_scale_gives_every_nine_its_own_decade(rows):
    ax = plot_training(rows()).axes[3]
    heights = ax.get_yaxis_transform().transform([(0, s) for s in (0, 90, 99, 99.9, 100)])[:, 1]
    steps = np.diff(heights)
    # The hundredth that keeps 100 % on the page shifts 99.9 % by log10(1.1) of a decade.
    np.testing.assert_allclose(steps / steps[0], 1.0, atol=0.05)


def test_values_that_are_not_positive_are_drawn_on_a_linear_scale(rows):
    table = rows()
    assert plot_training(table).axes[0].get_yscale() == "log"
    table[3]["nll"] = -1.0
    ax = plot_training(table).axes[0]
    assert ax.get_yscale() == "linear"
    assert lines(ax)[0][3] == -1.0


def test_a_single_epoch_is_visible(rows):
    ax = plot_training(rows()[:1]).axes[0]
    assert ax.lines[0].get_marker() == "o"
    assert ax.get_xlim()[1] > ax.get_xlim()[0]


def test_a_deep_network_has_all_its_lines_and_a_legend_that_fits(rows):
    sites = [f"layers.{i}.weight" for i in range(40)]
    ax = plot_training(rows(sites=sites)).axes[3]
    assert len(ax.lines) == 40
    assert len({tuple(line.get_color()) for line in ax.lines}) == 40
    assert len(ax.get_legend().get_texts()) <= 16


def test_history_must_be_rows_and_not_empty(posterior):
    with pytest.raises(ValueError, match="history is empty: no epoch was done"):
        plot_training(History())
    with pytest.raises(TypeError, match=r"but is a Posterior.\n  Try posterior.history"):
        plot_training(posterior)


# Histograms.


def test_bars_of_each_layer_add_up_to_its_weights(posterior, zeroed):
    for drawn in (posterior, zeroed):
        log_alpha = drawn.log_alpha()
        axes = plot_log_alpha(drawn).axes
        assert len(axes) == len(SITES)
        for ax, values in zip(axes, log_alpha.values(), strict=True):
            assert sum(bar.get_height() for bar in ax.patches) == values.numel()


def test_bars_left_of_the_threshold_are_the_weights_that_are_kept(posterior):
    for threshold in (None, -1.7, 0.0, 50.0):
        at = 3.0 if threshold is None else threshold
        axes = plot_log_alpha(posterior, threshold).axes
        for ax, values in zip(axes, posterior.log_alpha().values(), strict=True):
            assert [line.get_xdata() for line in ax.lines] == [[at, at]]
            left = [bar for bar in ax.patches if bar.get_x() + bar.get_width() / 2 < at]
            assert sum(bar.get_height() for bar in left) == (values < at).sum()
            right = set(ax.patches) - set(left)
            assert not {bar.get_facecolor() for bar in left} & {b.get_facecolor() for b in right}


def test_bars_stand_where_the_values_are(posterior):
    for ax, values in zip(
        plot_log_alpha(posterior).axes, posterior.log_alpha().values(), strict=True
    ):
        for bar in ax.patches:
            low, high = bar.get_x(), bar.get_x() + bar.get_width()
            inside = ((values >= low) & (values < high)).sum()
            assert bar.get_height() == inside


def test_infinite_values_stand_in_a_bar_of_their_own(posterior, zeroed):
    for ax, values in zip(plot_log_alpha(zeroed).axes, zeroed.log_alpha().values(), strict=True):
        assert values.isinf().any()
        bar = ax.patches[-1]
        assert bar.get_height() == values.isinf().sum()
        assert bar.get_x() > values[values.isfinite()].max()
        assert bar.get_x() > 3.0
        label = dict(
            zip(ax.get_xticks(), (t.get_text() for t in ax.get_xticklabels()), strict=True)
        )
        assert label[bar.get_x() + bar.get_width() / 2] == "∞"
    for figure, named in ((plot_log_alpha(zeroed), True), (plot_log_alpha(posterior), False)):
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert any("while training" in text for text in texts) == named
        assert "threshold 3" in texts


def test_all_weights_pruned_or_none_is_no_special_case(posterior, render):
    unpruned = plot_log_alpha(posterior, threshold=math.inf)
    with torch.no_grad():
        posterior.guide.prune_(-math.inf)
    figure = plot_log_alpha(posterior)
    assert figure.get_suptitle().startswith("0 of 114 weights are kept")
    assert [len([b for b in ax.patches if b.get_height()]) for ax in figure.axes] == [1, 1]
    assert unpruned.get_suptitle().startswith("114 of 114 weights are kept")
    assert all(not ax.lines for ax in unpruned.axes)
    render(figure)
    render(unpruned)


def test_histogram_panels_are_labelled(posterior):
    figure = plot_log_alpha(posterior)
    counts = [int((values < 3).sum()) for values in posterior.log_alpha().values()]
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        f"fc1: {counts[0]} of 96 kept",
        f"fc2: {counts[1]} of 18 kept",
    ]
    assert [ax.get_xlabel() for ax in figure.axes] == ["log α", "log α"]
    assert figure.axes[0].get_ylabel() == "number of weights"


def test_a_deep_network_has_a_panel_per_layer_and_no_empty_ones():
    model = BayesianNetwork(dense((4,) * 15), Categorical(), 10)
    figure = plot_log_alpha(Posterior(model, AdditiveNoiseGuide(model)))
    assert len(figure.axes) == 14
    assert [ax.get_xlabel() for ax in figure.axes[-4:]] == 4 * ["log α"]


def test_log_alpha_must_be_a_number(posterior):
    with torch.no_grad():
        posterior.guide.sigma_parameters()[1][0, 0] = math.nan
    with pytest.raises(ValueError, match=r'at site "fc2.weight", 1 values of log alpha are NaN'):
        plot_log_alpha(posterior)
    with pytest.raises(ValueError, match="threshold must be a number"):
        plot_log_alpha(posterior, threshold=math.nan)
    with pytest.raises(TypeError, match=r"plot_log_alpha needs a Posterior.*is a Sequential"):
        plot_log_alpha(posterior.prune())
