"""Pictures show the numbers that they were given, and leave no trace beside themselves."""

import gc
import io
import math
import weakref
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pyro
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from bayes_svdo import LogUniform
from bayes_svdo.analysis import (
    Snapshot,
    animate_sparsification,
    plot_log_alpha,
    plot_training,
    plot_weights,
    plot_weights_before_after,
)
from bayes_svdo.inference import AdditiveNoiseGuide, History, Posterior
from bayes_svdo.models import BayesianNetwork, Categorical, dense

mpl.use("Agg")
EPOCHS = 10
SITES = ("fc1.weight", "fc2.weight")


def rows(metric="accuracy", warmup_end=4, validation=True, sites=SITES):
    table = []
    for epoch in range(1, EPOCHS + 1):
        row = {
            "epoch": epoch,
            "nll": 2.0 / epoch,
            "kl": 5000.0 / epoch**2,
            "kl_weight": min(1.0, epoch / warmup_end),
            "compression": 1.0 + epoch**2,
        }
        if metric:
            row[metric] = 1 - 0.5 / epoch
        if validation:
            row["validation_nll"] = 2.5 / epoch
            if metric:
                row[f"validation_{metric}"] = 1 - 0.6 / epoch
        for index, site in enumerate(sites):
            row[f"sparsity/{site}"] = 100 * (1 - 1 / (epoch + index))
        table.append(row)
    return table


def column(table, name):
    return [row[name] for row in table]


def make_posterior(zeroed=False):
    """16 inputs (4 x 4 pixels), 6 units, 3 classes; about a third of the weights pruned."""
    torch.manual_seed(0)
    model = BayesianNetwork(dense((16, 6, 3)), Categorical(), 10)
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        for loc in guide.location_parameters():
            loc.add_(0.1)  # fitted weights are not those before training
        for log_sigma2 in guide.sigma_parameters():
            log_sigma2.copy_(8 * torch.rand_like(log_sigma2) - 5)
    if zeroed:
        guide.prune_(3.0)
    return Posterior(model, guide, history=History(rows()))


@pytest.fixture
def posterior():
    return make_posterior()


@pytest.fixture
def zeroed():
    return make_posterior(zeroed=True)


def make_hand_written():
    def model(x):
        return pyro.sample("w", LogUniform().expand([3, 4]).to_event(2))

    guide = AdditiveNoiseGuide(model)
    guide(torch.zeros(1))
    return Posterior(model, guide)


def make_snapshots(number=5, site="fc1.weight"):
    torch.manual_seed(0)
    weights = torch.randn(6, 16)
    return [
        Snapshot(
            site,
            epoch,
            weights * (torch.rand(6, 16) < 1 / epoch),
            {"compression": float(epoch), "validation_accuracy": 0.5 + 0.05 * epoch},
        )
        for epoch in range(1, number + 1)
    ]


def lines(ax):
    return [line.get_ydata().tolist() for line in ax.lines]


def drawn_tiles(ax, shape=(4, 4)):
    """The mosaic cut up again, (tiles, height, width)."""
    image = ax.images[0].get_array().filled(np.nan)
    rows, columns = image.shape[0] // shape[0], image.shape[1] // shape[1]
    tiles = image.reshape(rows, shape[0], columns, shape[1]).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, *shape)


def render(figure):
    file = io.BytesIO()
    figure.savefig(file, dpi=40)
    return file.getvalue()


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


# Training curves.


def test_curves_are_the_columns_of_the_history():
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


def test_every_panel_says_what_it_shows_and_in_which_unit():
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


def test_the_title_says_what_came_out():
    table = rows()
    assert plot_training(table).get_suptitle() == (
        "Compressed 101x after 10 epochs, validation error 6.0 %"
    )
    table[-1]["compression"] = math.inf
    assert plot_training(table).get_suptitle().startswith("No weight left after 10 epochs")
    table = rows("rmse")
    assert plot_training(table).get_suptitle().endswith("validation RMSE 0.94")


def test_rmse_takes_the_place_of_the_error_and_a_model_without_metric_has_no_such_panel():
    table = rows("rmse", validation=False)
    _, _, error, _ = plot_training(table).axes
    assert error.get_ylabel() == "RMSE (units of y)"
    assert lines(error) == [column(table, "rmse")]
    figure = plot_training(rows(metric=None))
    assert len(figure.axes) == 3
    assert figure.get_suptitle() == "Compressed 101x after 10 epochs"
    assert [ax.get_xlabel() for ax in figure.axes] == 3 * ["epoch"]


@pytest.mark.parametrize(("warmup_end", "shaded"), [(4, (1, 4)), (100, (1, 10)), (1, None)])
def test_epochs_before_the_kl_has_full_weight_are_shaded(warmup_end, shaded):
    for ax in plot_training(rows(warmup_end=warmup_end)).axes:
        spans = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in ax.patches]
        assert spans == ([] if shaded is None else [shaded])
    legend = plot_training(rows(warmup_end=warmup_end)).axes[1].get_legend()
    assert (legend is not None) == (shaded is not None)


def test_a_layer_without_any_weight_is_on_the_page():
    table = rows()
    table[-1]["sparsity/fc1.weight"] = 100.0
    ax = plot_training(table).axes[3]
    line = ax.lines[0]
    shown = ax.transAxes.inverted().transform(ax.transData.transform(line.get_xydata()))
    assert np.isfinite(shown).all()
    assert shown[-1, 1] == pytest.approx(1.0, abs=1e-9)
    assert np.all(np.diff(shown[:, 1]) > 0)


def test_sparsity_scale_gives_every_nine_its_own_decade():
    ax = plot_training(rows()).axes[3]
    heights = ax.get_yaxis_transform().transform([(0, s) for s in (0, 90, 99, 99.9, 100)])[:, 1]
    steps = np.diff(heights)
    # The hundredth that keeps 100 % on the page shifts 99.9 % by log10(1.1) of a decade.
    np.testing.assert_allclose(steps / steps[0], 1.0, atol=0.05)


def test_values_that_are_not_positive_are_drawn_on_a_linear_scale():
    table = rows()
    assert plot_training(table).axes[0].get_yscale() == "log"
    table[3]["nll"] = -1.0
    ax = plot_training(table).axes[0]
    assert ax.get_yscale() == "linear"
    assert lines(ax)[0][3] == -1.0


def test_a_single_epoch_is_visible():
    ax = plot_training(rows()[:1]).axes[0]
    assert ax.lines[0].get_marker() == "o"
    assert ax.get_xlim()[1] > ax.get_xlim()[0]


def test_a_deep_network_has_all_its_lines_and_a_legend_that_fits():
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


def test_all_weights_pruned_or_none_is_no_special_case(posterior):
    with torch.no_grad():
        posterior.guide.prune_(-math.inf)
    figure = plot_log_alpha(posterior)
    assert figure.get_suptitle().startswith("0 of 114 weights are kept")
    assert [len([b for b in ax.patches if b.get_height()]) for ax in figure.axes] == [1, 1]
    unpruned = plot_log_alpha(make_posterior(), threshold=math.inf)
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


# Weights as images.


def ranked(weights):
    """Units by number of nonzero weights, then by norm."""
    return sorted(
        range(len(weights)),
        key=lambda unit: (-int((weights[unit] != 0).sum()), -float(weights[unit].norm())),
    )


def test_images_are_the_pruned_weights_of_the_units_that_kept_most(posterior):
    weights = posterior.means()["fc1.weight"]
    assert 0 < (weights == 0).sum() < weights.numel()
    tiles = drawn_tiles(plot_weights(posterior, count=4))
    expected = weights[ranked(weights)[:4]].view(4, 4, 4)
    np.testing.assert_array_equal(tiles[:4], expected.double().numpy())


def test_an_infinite_threshold_draws_the_weights_before_pruning(posterior):
    weights = posterior.guide.median()["fc1.weight"]
    tiles = drawn_tiles(plot_weights(posterior, threshold=math.inf, count=None))
    np.testing.assert_array_equal(tiles[:6], weights.view(6, 4, 4).double().numpy())


def test_a_module_is_drawn_as_it_is(posterior):
    net = posterior.prune()
    for site, shape in ((None, None), ("fc2.weight", (2, 3))):
        drawn = drawn_tiles(plot_weights(net, site, shape), shape or (4, 4))
        expected = drawn_tiles(plot_weights(posterior, site, shape), shape or (4, 4))
        np.testing.assert_array_equal(drawn, expected)


def test_places_without_a_unit_are_not_zero_weights():
    net = nn.Linear(4, 5)
    tiles = drawn_tiles(plot_weights(net), (2, 2))
    assert len(tiles) == 6
    assert np.isnan(tiles[5]).all()
    assert np.isfinite(tiles[:5]).all()


def test_colours_are_symmetric_about_zero_and_end_at_the_95_percent_quantile(posterior):
    ax = plot_weights(posterior)
    low, high = ax.images[0].get_clim()
    weights = posterior.means()["fc1.weight"]
    sizes = weights[weights != 0].abs().double().numpy()
    assert -low == high == pytest.approx(np.quantile(sizes, 0.95))
    centre = ax.images[0].cmap(0.5)[:3]
    assert min(centre) > 0.95  # zero is white


def test_a_layer_without_weights_has_a_colour_scale():
    net = nn.Linear(4, 3)
    nn.init.zeros_(net.weight)
    ax = plot_weights(net)
    assert ax.images[0].get_clim() == (-1.0, 1.0)
    render(ax.figure)


def test_channels_stand_side_by_side():
    net = nn.Linear(12, 1)
    image = drawn_tiles(plot_weights(net, image_shape=(3, 2, 2)), (2, 6))[0]
    channels = net.weight.detach().double().view(3, 2, 2).numpy()
    np.testing.assert_array_equal(image, np.concatenate(list(channels), axis=1))


@pytest.mark.parametrize(
    ("layer", "tile", "noun"),
    [
        (nn.Conv2d(2, 3, (3, 4)), (3, 4), "kernels"),
        (nn.Conv1d(2, 3, 5), (2, 5), "units"),
        (nn.Conv3d(1, 2, (2, 3, 4)), (2, 12), "kernels"),
    ],
)
def test_every_kernel_of_a_convolution_is_an_image(layer, tile, noun):
    ax = plot_weights(layer, count=None)
    tiles = drawn_tiles(ax, tile)
    expected = layer.weight.detach().double().numpy().reshape(-1, *tile)
    np.testing.assert_array_equal(tiles[: len(expected)], expected)
    assert f"all {len(expected)} {noun}" in ax.get_title(loc="left")


def test_the_title_says_which_units_and_how_many_weights(posterior):
    left = int((posterior.means()["fc1.weight"] != 0).sum())
    ax = plot_weights(posterior, count=2)
    assert ax.get_title(loc="left") == (
        f"fc1: the 2 of 6 units with most weights left\n{left} of 96 weights not zero"
    )
    ax = plot_weights(posterior, count=2, threshold=math.inf)
    assert ax.get_title(loc="left").startswith("fc1: the 2 of 6 units of largest norm")
    colourbar = next(a for a in ax.figure.axes if a is not ax)
    assert colourbar.get_ylabel() == "weight"


def test_weights_are_drawn_into_the_axes_given(posterior):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_weights(posterior, ax=right) is right
    assert right.images
    assert not left.images


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"site": "fc1.wieght"}, ValueError, 'unknown site.*Did you mean "fc1.weight"'),
        ({"image_shape": (4, 5)}, ValueError, r'16 inputs of "fc1.weight", but is \(4, 5\)'),
        ({"image_shape": (16,)}, ValueError, r"image_shape must be .*but is \(16,\)"),
        ({"image_shape": (-4, -4)}, ValueError, r"image_shape must be"),
        ({"site": "fc2.weight"}, ValueError, r'6 inputs of "fc2.weight" are no square(.|\n)*Try'),
        ({"count": 0}, ValueError, "count must be an integer of at least 1"),
        ({"threshold": "3"}, ValueError, "threshold must be a number"),
    ],
)
def test_bad_arguments_of_plot_weights_are_named(posterior, arguments, error, message):
    with pytest.raises(error, match=message):
        plot_weights(posterior, **arguments)


def test_bad_sources_are_named(posterior):
    with pytest.raises(TypeError, match=r"source must be a Posterior or a torch.nn.Module.*Tensor"):
        plot_weights(torch.zeros(3, 3))
    with pytest.raises(TypeError, match="threshold goes with a posterior"):
        plot_weights(posterior.prune(), threshold=3.0)
    with pytest.raises(ValueError, match="no parameter of two or more dimensions"):
        plot_weights(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r'unknown site.*Did you mean "fc2.weight"'):
        plot_weights(posterior.prune(), "fc2.weigh")
    with pytest.raises(ValueError, match=r"must be left out or be \(3, 3\)"):
        plot_weights(nn.Conv2d(1, 1, 3), image_shape=(9, 1))
    broken = nn.Linear(4, 4)
    nn.init.constant_(broken.weight, math.nan)
    with pytest.raises(ValueError, match='16 weights of "weight" are NaN'):
        plot_weights(broken)


def test_panels_are_before_training_before_pruning_and_after(posterior):
    figure = plot_weights_before_after(posterior, count=None)
    states = (
        posterior.model.initial_weights()["fc1.weight"],
        posterior.guide.median()["fc1.weight"],
        posterior.means()["fc1.weight"],
    )
    axes = panels(figure)
    assert len(axes) == 3
    for ax, weights, name in zip(
        axes, states, ("before training", "before pruning", "after"), strict=True
    ):
        np.testing.assert_array_equal(drawn_tiles(ax)[:6], weights.view(6, 4, 4).double().numpy())
        title = ax.get_title(loc="left")
        assert title.startswith(name)
        assert title.endswith(f": {int((weights != 0).sum())} weights")
    assert len({ax.images[0].get_clim() for ax in axes}) == 1


def test_units_are_the_same_in_every_panel(posterior):
    chosen = ranked(posterior.means()["fc1.weight"])[:2]
    first = panels(plot_weights_before_after(posterior, count=2))[0]
    expected = posterior.model.initial_weights()["fc1.weight"][chosen].view(2, 4, 4)
    np.testing.assert_array_equal(drawn_tiles(first)[:2], expected.double().numpy())


def test_weights_zeroed_while_training_have_no_state_before_pruning(zeroed):
    titles = [ax.get_title(loc="left") for ax in panels(plot_weights_before_after(zeroed))]
    assert [title.split(":")[0] for title in titles] == ["before training", "after pruning"]


def test_a_hand_written_model_has_no_weights_before_training():
    posterior = make_hand_written()
    titles = [ax.get_title(loc="left") for ax in panels(plot_weights_before_after(posterior))]
    assert [title.split(":")[0] for title in titles] == ["before pruning", "after pruning"]
    posterior.guide.prune_(-math.inf)
    with pytest.raises(ValueError, match=r"nothing to compare \"w\" with(.|\n)*Try plot_weights"):
        plot_weights_before_after(posterior)


def test_before_and_after_needs_a_posterior(posterior):
    with pytest.raises(TypeError, match="plot_weights_before_after needs a Posterior"):
        plot_weights_before_after(posterior.prune())


# Animation.


def test_a_gif_has_a_frame_per_snapshot_and_they_differ(tmp_path):
    path = animate_sparsification(make_snapshots(), str(tmp_path / "new" / "a.gif"), fps=5)
    assert path == tmp_path / "new" / "a.gif"
    with Image.open(path) as gif:
        assert gif.n_frames == 5
        frames, durations = [], []
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB"), dtype=int))
            durations.append(gif.info["duration"])
    for one, next_one in pairwise(frames):
        weights = slice(one.shape[0] // 3, None)  # below the title
        assert (one[weights] != next_one[weights]).any()
    assert durations[:-1] == 4 * [200]
    assert durations[-1] >= 1000  # the result stands for a while
    assert gif.info["loop"] == 0


def test_a_frame_shows_the_weights_of_its_snapshot(tmp_path, monkeypatch):
    """Titles and images as they were when each frame was drawn."""
    seen = []
    draw = mpl.backends.backend_agg.FigureCanvasAgg.draw

    def spy(canvas):
        seen.append((canvas.figure.get_suptitle(), drawn_tiles(canvas.figure.axes[0])))
        draw(canvas)

    monkeypatch.setattr(mpl.backends.backend_agg.FigureCanvasAgg, "draw", spy)
    snapshots = make_snapshots()
    animate_sparsification(snapshots, tmp_path / "a.gif", count=4)
    chosen = sorted(ranked(snapshots[-1].weights)[:4])
    assert len(seen) == len(snapshots)
    for (title, tiles), snapshot in zip(seen, snapshots, strict=True):
        expected = snapshot.weights[chosen].view(4, 4, 4).double().numpy()
        np.testing.assert_array_equal(tiles[:4], expected)
        left = int((snapshot.weights != 0).sum())
        assert title == (
            f"epoch {snapshot.epoch}: {left} of 96 weights left in fc1 (4 of 6 units shown)\n"
            f"network compressed {snapshot.epoch}.0x, "
            f"validation accuracy {50 + 5 * snapshot.epoch}.0 %"
        )


def test_a_run_without_metric_or_weights_can_be_animated(tmp_path):
    snapshots = [
        Snapshot("w", 1, torch.ones(3, 4), {"compression": 1.0, "rmse": 0.5}),
        Snapshot("w", 2, torch.zeros(3, 4), {"compression": math.inf}),
    ]
    with Image.open(animate_sparsification(snapshots, tmp_path / "a.gif")) as gif:
        assert gif.n_frames == 2


def test_a_failed_animation_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.gif"
    path.write_bytes(b"old")

    def fail(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        animate_sparsification(make_snapshots(2), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    animate_sparsification(make_snapshots(2), path)
    assert path.read_bytes().startswith(b"GIF89a")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("snapshots", "arguments", "message"),
    [
        ([], {}, r"no snapshots, so there is nothing to animate.\n  Try"),
        (make_snapshots(1) + make_snapshots(1, "fc2.weight"), {}, "one site.*fc1.weight, fc2"),
        (make_snapshots(1), {"path": "a.png"}, 'path must end in ".gif", but is "a.png"'),
        (make_snapshots(1), {"fps": 0}, "fps must be a positive number"),
        (make_snapshots(1), {"fps": 60}, "fps must be at most 50.*but is 60"),
        (make_snapshots(1), {"image_shape": (3, 3)}, "image_shape must be"),
        (make_snapshots(1), {"count": 0}, "count must be an integer"),
    ],
)
def test_bad_arguments_of_an_animation_are_named(snapshots, arguments, message, tmp_path):
    arguments = {"path": tmp_path / "a.gif", **arguments}
    with pytest.raises(ValueError, match=message):
        animate_sparsification(snapshots, **arguments)
    assert not list(tmp_path.iterdir())


# What all have in common.

DRAWINGS = {
    "training": lambda posterior: plot_training(posterior.history),
    "log_alpha": plot_log_alpha,
    "weights": lambda posterior: plot_weights(posterior).figure,
    "before_after": plot_weights_before_after,
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_pictures_render_and_leave_no_trace(draw, posterior):
    settings, open_figures = dict(mpl.rcParams), plt.get_fignums()
    figure = draw(posterior)
    assert render(figure).startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == open_figures
    alive = weakref.ref(figure)
    del figure
    gc.collect()
    assert alive() is None


def test_an_animation_leaves_no_trace(tmp_path):
    settings, open_figures = dict(mpl.rcParams), plt.get_fignums()
    animate_sparsification(make_snapshots(2), tmp_path / "a.gif")
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == open_figures


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_where_pyplot_has_a_screen_it_shows_the_picture(draw, posterior, monkeypatch):
    monkeypatch.setattr(mpl, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    figure = draw(posterior)
    try:
        assert plt.fignum_exists(figure.number)
    finally:
        plt.close(figure)


@pytest.mark.parametrize(
    "draw",
    [
        lambda posterior, figure: plot_training(posterior.history, figure=figure),
        lambda posterior, figure: plot_log_alpha(posterior, figure=figure),
        lambda posterior, figure: plot_weights_before_after(posterior, figure=figure),
    ],
    ids=["training", "log_alpha", "before_after"],
)
def test_pictures_of_several_panels_are_drawn_into_the_figure_given(draw, posterior):
    whole = Figure(layout="constrained", figsize=(12, 5))
    left, right = whole.subfigures(1, 2)
    assert draw(posterior, right) is right
    assert right.axes
    assert not left.axes
    render(whole)
