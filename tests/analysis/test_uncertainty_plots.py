"""Pictures of predictions: bands, sorted images, reliability, risk against coverage."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.stats import binomtest, norm

from bayes_svdo.analysis import (
    ClassificationPredictive,
    RegressionPredictive,
    Reliability,
    plot_predictive_bands,
    plot_reliability,
    plot_risk_coverage,
    plot_uncertain_images,
    reliability,
    risk_coverage,
)
from bayes_svdo.analysis.figures import ORANGE

N = 12


def make_regression(draws=200, noise=0.5):
    means = torch.linspace(-1, 1, N, dtype=torch.float64) + torch.randn(
        draws, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    scales = torch.full((1, 1), noise, dtype=torch.float64)
    return RegressionPredictive(
        means.mean(0),
        scales.square().expand(1, N)[0],
        means.var(0, correction=0),
        means,
        scales,
        "weights",
        draws,
    )


@pytest.fixture
def classes():
    """Six images of three classes, less and less certain from the third on, cyclically."""
    p = torch.tensor([0.70, 0.80, 0.99, 0.40, 0.50, 0.60], dtype=torch.float64)
    others = (1 - p) / 2
    probabilities = torch.stack([p, others, others], 1)
    probabilities[3] = torch.tensor([0.25, 0.4, 0.35])
    predictive = ClassificationPredictive(probabilities.log(), torch.zeros(N // 2), "weights", 10)
    images = torch.rand(6, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    return predictive, images


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# Bands.


def band_ends(collection):
    """Lower and upper end at each x of a filled band."""
    vertices = collection.get_paths()[0].vertices
    x = np.unique(vertices[:, 0])
    return np.array([[f(vertices[vertices[:, 0] == v, 1]) for v in x] for f in (np.min, np.max)])


def test_filled_bands_are_the_intervals_of_new_targets():
    predictive = make_regression()
    ax = plot_predictive_bands(predictive, torch.arange(N))
    assert len(ax.collections) == 2
    for collection, level in zip(ax.collections, (0.95, 0.5), strict=True):
        expected = [end.numpy() for end in predictive.interval(level)]
        np.testing.assert_allclose(band_ends(collection), expected)


def test_lines_are_the_intervals_of_the_function_without_noise():
    predictive = make_regression()
    ax = plot_predictive_bands(predictive, torch.arange(N)[:, None])
    drawn = [line.get_ydata() for line in ax.lines]
    tails = np.quantile(predictive.component_means, [0.025, 0.975, 0.25, 0.75], axis=0)
    np.testing.assert_allclose(drawn[:4], tails)
    np.testing.assert_allclose(drawn[4], predictive.mean)
    assert labels(ax) == [
        "95 % of new targets",
        "50 % of new targets",
        "95 % of functions (epistemic)",
        "50 % of functions (epistemic)",
        "mean",
    ]


def test_a_gaussian_of_one_component_has_the_interval_of_its_epistemic_part():
    mean, epistemic = torch.zeros(2, dtype=torch.float64), torch.tensor([4.0, 9.0]).double()
    predictive = RegressionPredictive(
        mean, torch.ones(2), epistemic, mean[None], (1 + epistemic).sqrt()[None], "moments", 1
    )
    ax = plot_predictive_bands(predictive, [0.0, 1.0])
    high = norm.ppf(0.975) * np.array([2.0, 3.0])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), high, rtol=1e-6)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), -high, rtol=1e-6)


def test_inputs_may_come_in_any_order_and_data_are_points():
    predictive = make_regression()
    x = torch.randperm(N, generator=torch.Generator().manual_seed(1)).double()
    ax = plot_predictive_bands(
        predictive, x, (torch.tensor([3.0, 1.0]), [[0.1], [0.2]]), xlabel="time (s)", ylabel="m"
    )
    np.testing.assert_array_equal(ax.lines[4].get_xdata(), np.arange(N))
    np.testing.assert_allclose(ax.lines[4].get_ydata(), predictive.mean[x.argsort()])
    np.testing.assert_allclose(ax.lines[5].get_xydata(), [[3.0, 0.1], [1.0, 0.2]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time (s)", "m")
    assert labels(ax)[-1] == "data"
    assert ax.get_xlim() == (0.0, N - 1)


def test_data_beyond_the_grid_are_in_view():
    x, y = [-3.0, 2.0, 40.0], [9.0, 0.0, -9.0]
    ax = plot_predictive_bands(make_regression(), torch.arange(N), [x, y])
    low, high = ax.get_ylim()
    assert ax.get_xlim() == (-3.0, 40.0)
    assert low < -9 < 9 < high


def test_bands_name_what_is_wrong(classes):
    predictive = make_regression()
    with pytest.raises(TypeError, match=r"predictive must be a RegressionPredictive, but is a Cl"):
        plot_predictive_bands(classes[0], torch.arange(6))
    with pytest.raises(TypeError, match=r"data must be a pair \(x, y\), but is a dict"):
        plot_predictive_bands(predictive, torch.arange(N), {"x": [1.0], "y": [2.0]})
    with pytest.raises(TypeError, match=r"data\[1\] must be a tensor or an array, but is a str"):
        plot_predictive_bands(predictive, torch.arange(N), ([1.0], "a"))
    with pytest.raises(ValueError, match=r"x must hold the 12 inputs of predictive.*holds 3"):
        plot_predictive_bands(predictive, torch.arange(3))
    with pytest.raises(ValueError, match=r"x must have shape \(N,\) or \(N, 1\), but has \(12, 2"):
        plot_predictive_bands(predictive, torch.zeros(N, 2))
    with pytest.raises(ValueError, match=r"data must be x and y of one length.*2 and 1"):
        plot_predictive_bands(predictive, torch.arange(N), ([1.0, 2.0], [1.0]))
    with pytest.raises(ValueError, match="x"):
        plot_predictive_bands(predictive, torch.full((N,), torch.nan))


# Images.


def captions(ax):
    return [text.get_text() for text in ax.texts]


def test_images_come_by_descending_uncertainty(classes):
    predictive, images = classes
    order = predictive.entropy.argsort(descending=True).tolist()
    ax = plot_uncertain_images(predictive, images, count=4)
    for drawn, index in zip(ax.images, order[:4], strict=True):
        np.testing.assert_array_equal(drawn.get_array(), images[index, 0].double())
        assert drawn.get_clim() == (0.0, 1.0)
    least = plot_uncertain_images(predictive, images, which="least", count=2)
    np.testing.assert_array_equal(least.images[1].get_array(), images[order[-1], 0].double())
    spread = plot_uncertain_images(predictive, images, which="spread", count=2)
    for drawn, index in zip(spread.images, (order[0], order[-1]), strict=True):
        np.testing.assert_array_equal(drawn.get_array(), images[index, 0].double())
    assert len(plot_uncertain_images(predictive, images, which="spread").images) == 6


def test_captions_tell_prediction_truth_and_nats(classes):
    predictive, images = classes
    truth = torch.tensor([0, 0, 0, 2, 1, 0])
    names = ("cat", "dog", "owl")
    ax = plot_uncertain_images(predictive, images, truth, class_names=names, count=2)
    nats = predictive.entropy.sort(descending=True).values
    assert captions(ax) == [
        f"dog, is owl\n{nats[0]:#.2g} nats",
        f"cat, is dog\n{nats[1]:#.2g} nats",
    ]
    assert {to_hex(text.get_color()).upper() for text in ax.texts} == {ORANGE}
    ax = plot_uncertain_images(predictive, images, truth, count=1, which="least")
    assert captions(ax) == [f"0\n{nats[-1]:#.2g} nats"]
    assert to_hex(ax.texts[0].get_color()) == "#000000"
    assert captions(plot_uncertain_images(predictive, images, count=1))[0].startswith("1\n")
    sure = ClassificationPredictive(
        torch.tensor([[1.0, 0.0, 0.0]]).log(), torch.zeros(1), "weights", 10
    )
    assert captions(plot_uncertain_images(sure, images[:1])) == ["0\n< 0.001 nats"]


def test_images_can_be_sorted_by_mutual_information(classes):
    predictive, images = classes
    expected_entropy = predictive.entropy.clone()
    expected_entropy[4] = 0.0  # all of its entropy is epistemic
    other = ClassificationPredictive(predictive.log_probabilities, expected_entropy, "weights", 10)
    ax = plot_uncertain_images(other, images, by="mutual_information", count=1)
    np.testing.assert_array_equal(ax.images[0].get_array(), images[4, 0].double())
    assert captions(ax) == [f"0\n{predictive.entropy[4]:#.2g} nats"]
    assert "by mutual information" in ax.get_title(loc="left")


def test_colour_images_and_images_without_channel_are_drawn(classes):
    predictive, images = classes
    colour = images.expand(6, 3, 4, 5)
    ax = plot_uncertain_images(predictive, colour, count=1)
    assert ax.images[0].get_array().shape == (4, 5, 3)
    assert len(plot_uncertain_images(predictive, images[:, 0]).images) == 6


FASHION = ("T-shirt/top", "ankle boot", "sneaker, a long name of a class of many words")


@pytest.mark.parametrize("names", [None, ("sneaker", "pullover", "ankle boot"), FASHION], ids=str)
@pytest.mark.parametrize("width", [None, 5.0])
@pytest.mark.parametrize("dpi", [90, 150])
def test_long_names_do_not_overlap(classes, names, width, dpi):
    predictive, images = classes
    many = ClassificationPredictive(
        predictive.log_probabilities.repeat(3, 1), torch.zeros(18), "weights", 10
    )
    given = None if width is None else Figure((width, 6.0), layout="constrained").subplots()
    truth = torch.tensor([0, 1, 2] * 6)
    ax = plot_uncertain_images(
        many, images.repeat(3, 1, 1, 1), truth, count=18, class_names=names, ax=given
    )
    figure = ax.figure
    figure.savefig(io.BytesIO(), dpi=dpi)
    figure.set_dpi(dpi)
    title = ax._left_title
    boxes = [artist.get_window_extent() for artist in (*ax.texts, *ax.images, title)]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        assert index == len(boxes) - 1 or figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_long_names_stand_below_each_other(classes):
    predictive, images = classes
    names = ("sneaker", "pullover", "ankle boot")
    ax = plot_uncertain_images(predictive, images, torch.ones(6).long(), class_names=names)
    for text in captions(ax):
        name, *second, nats = text.split("\n")
        assert (name, second) in ((f"{names[0]},", [f"is {names[1]}"]), (names[1], []))
        assert nats.endswith(" nats")


def test_a_net_of_one_output_has_images_of_two_classes(classes):
    _, images = classes
    p = torch.linspace(0.1, 0.9, 6).double()[:, None]
    predictive = ClassificationPredictive(
        torch.stack([1 - p, p], -1).log(), torch.zeros(6, 1), "weights", 10
    )
    flat = ClassificationPredictive(
        predictive.log_probabilities[:, 0], torch.zeros(6), "weights", 10
    )
    y = torch.tensor([0.0, 1, 0, 1, 0, 1])
    for by in ("entropy", "mutual_information"):
        ax = plot_uncertain_images(predictive, images, y[:, None], by=by)
        assert captions(ax) == captions(plot_uncertain_images(flat, images, y, by=by))


def test_images_and_captions_do_not_overlap(classes):
    predictive, images = classes
    twice = ClassificationPredictive(
        predictive.log_probabilities.repeat(2, 1), torch.zeros(12), "weights", 10
    )
    ax = plot_uncertain_images(twice, images.repeat(2, 1, 1, 1), torch.ones(12).long())
    assert len({image.get_extent()[3] for image in ax.images}) == 2  # rows
    ax.figure.canvas.draw()
    boxes = [artist.get_window_extent() for artist in (*ax.texts, *ax.images)]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_captions_shrink_with_the_axes_that_are_given(classes):
    sizes = []
    for width in (12.0, 4.0, 2.0):
        ax = Figure(figsize=(width, width)).subplots()
        sizes.append(plot_uncertain_images(*classes, ax=ax).texts[0].get_fontsize())
    assert sizes[0] == 7.0 > sizes[1] == pytest.approx(2 * sizes[2])


def test_images_name_what_is_wrong(classes):
    predictive, images = classes
    with pytest.raises(TypeError, match="predictive must be a ClassificationPredictive, but is"):
        plot_uncertain_images(make_regression(), images)
    with pytest.raises(ValueError, match=r'unknown by "entrop". Did you mean "entropy"'):
        plot_uncertain_images(predictive, images, by="entrop")
    with pytest.raises(ValueError, match='unknown which "all"'):
        plot_uncertain_images(predictive, images, which="all")
    with pytest.raises(ValueError, match="images must be the 6 of predictive, but are 5"):
        plot_uncertain_images(predictive, images[:5])
    with pytest.raises(ValueError, match=r"images must have shape .* but have \(6, 2, 4, 5\)"):
        plot_uncertain_images(predictive, images.expand(6, 2, 4, 5))
    with pytest.raises(ValueError, match="images must hold numbers from 0 to 1, but reach"):
        plot_uncertain_images(predictive, 255 * images)
    with pytest.raises(ValueError, match="class_names must be a list of 3 names"):
        plot_uncertain_images(predictive, images, class_names=["a"])
    with pytest.raises(ValueError, match=r"y must have shape \(6,\)"):
        plot_uncertain_images(predictive, images, torch.zeros(5).long())
    with pytest.raises(ValueError, match="count must be an integer"):
        plot_uncertain_images(predictive, images, count=0)
    sequences = ClassificationPredictive(torch.zeros(2, 3, 4), torch.zeros(2, 3), "weights", 1)
    with pytest.raises(ValueError, match=r"one label per image.*shape \(2, 3, 4\)"):
        plot_uncertain_images(sequences, images)


# Reliability.


def test_points_are_the_bins_and_bars_their_intervals():
    bins = Reliability(np.array([0.6, 0.9]), np.array([0.5, 0.95]), np.array([10, 40]))
    ax = plot_reliability(bins)
    bars, points = ax.collections
    np.testing.assert_allclose(points.get_offsets(), [[0.6, 0.5], [0.9, 0.95]])
    sizes = points.get_sizes()
    assert sizes[1] / sizes[0] == pytest.approx(4.0)  # area, in proportion to the count
    for segment, right, count in zip(bars.get_segments(), (5, 38), (10, 40), strict=True):
        interval = binomtest(right, count).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(segment[:, 1], [interval.low, interval.high])
    assert labels(ax) == [f"ECE {100 * bins.ece:.1f} %, 2 bins of 10 to 40"]


def test_the_legend_is_below_the_label_of_the_axis():
    bins = Reliability(np.array([0.6]), np.array([0.5]), np.array([10]))
    ax = plot_reliability(bins)
    ax.figure.savefig(io.BytesIO())
    legend = ax.get_legend().get_window_extent()
    assert legend.y1 < ax.xaxis.label.get_window_extent().y0
    assert legend.y0 > ax.figure.bbox.y0


def test_both_axes_have_one_scale_with_all_that_is_drawn():
    bins = Reliability(np.array([0.6, 0.9]), np.array([0.5, 0.95]), np.array([10, 40]))
    ax = plot_reliability(bins)
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlim()[0] == 0.2  # below the lowest interval, which ends at 0.24
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), ax.lines[0].get_ydata())


def test_several_classifiers_are_told_apart():
    torch.manual_seed(0)
    p = torch.rand(300, 4).softmax(-1)
    y = p.multinomial(1)[:, 0]
    curves = {"right": reliability(p, y, 5), "wrong": reliability(p, (y + 1) % 4, 5)}
    ax = plot_reliability(curves)
    assert [label.split(":")[0] for label in labels(ax)] == ["right", "wrong"]
    assert all(label.endswith("5 bins of 60") for label in labels(ax))
    points = ax.collections[1::2]
    assert len({to_hex(each.get_facecolor()[0]) for each in points}) == 2
    for each, curve in zip(points, curves.values(), strict=True):
        np.testing.assert_allclose(each.get_offsets()[:, 1], curve.accuracy)


def test_reliability_names_what_is_wrong():
    with pytest.raises(ValueError, match="reliability is empty"):
        plot_reliability({})
    with pytest.raises(
        TypeError, match=r"reliability must be a Reliability, or a mapping.*ndarray"
    ):
        plot_reliability(np.ones(3))


# Risk against coverage.


def test_curves_are_risk_against_coverage():
    curve = risk_coverage([0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1])
    ax = plot_risk_coverage(curve, percent=True)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0, 0, 1 / 3, 0.5])
    assert ax.lines[1].get_linestyle() == ":"
    assert ax.lines[1].get_ydata()[0] == 0.5  # as if left out at random
    assert ax.get_ylim()[0] == 0.0
    assert ax.get_ylabel() == "errors among those kept (%)"
    assert plot_risk_coverage(curve).get_ylabel() == "mean loss of those kept"
    assert plot_risk_coverage(curve, ylabel="cost (€)").get_ylabel() == "cost (€)"
    assert labels(ax) == [f"AURC {100 * curve.area:.2f} %"]
    assert ax.yaxis.get_major_formatter()(0.25).startswith("25")


def test_several_curves_and_negative_losses():
    curves = {
        "a": risk_coverage([1, 2, 3], [-1.0, 0.0, 2.0]),
        "b": risk_coverage([3, 2, 1], [-1.0, 0.0, 2.0]),
    }
    ax = plot_risk_coverage(curves)
    assert labels(ax) == [f"{name}: AURC {curve.area:.3g}" for name, curve in curves.items()]
    assert ax.get_ylim()[0] < -1.0
    assert ax.lines[0].get_color() != ax.lines[2].get_color()


def test_risk_names_what_is_wrong():
    with pytest.raises(ValueError, match="curves is empty"):
        plot_risk_coverage({})
    with pytest.raises(TypeError, match=r"curves must be a RiskCoverage, or a mapping.*is a int"):
        plot_risk_coverage({"a": 3})


@pytest.mark.parametrize("layout", [None, "constrained"])
def test_legends_are_inside_of_axes_that_may_have_neighbours(layout):
    figure = Figure(figsize=(12, 4), layout=layout)
    axes = figure.subplots(1, 3)
    curve = risk_coverage([1, 2, 3], [0, 1, 2])
    bins = Reliability(np.array([0.6, 0.9]), np.array([0.5, 0.95]), np.array([10, 40]))
    plot_predictive_bands(make_regression(), torch.arange(N), ax=axes[0])
    plot_reliability({"a net": bins, "another": bins}, ax=axes[1])
    plot_risk_coverage({"a net": curve, "another": curve}, ax=axes[2])
    figure.savefig(io.BytesIO())
    for ax in axes:
        legend, inside = ax.get_legend().get_window_extent(), ax.get_window_extent()
        assert inside.x0 <= legend.x0 < legend.x1 <= inside.x1
        assert inside.y0 <= legend.y0 < legend.y1 <= inside.y1


def test_all_draw_where_they_are_told(classes):
    axes = Figure(figsize=(9, 9)).subplots(2, 2).ravel()
    curve = risk_coverage([1, 2], [0, 1])
    bins = Reliability(np.array([0.6]), np.array([0.5]), np.array([10]))
    assert plot_predictive_bands(make_regression(), torch.arange(N), ax=axes[0]) is axes[0]
    assert plot_uncertain_images(*classes, ax=axes[1]) is axes[1]
    assert plot_reliability(bins, ax=axes[2]) is axes[2]
    assert plot_risk_coverage(curve, ax=axes[3]) is axes[3]
