"""The poster's figure shows what it is given."""

import numpy as np
import pytest

from bayes_svdo.experiments.compare_figure import plot_dropout_rates


def images(figure):
    return [ax.images[0].get_array() for ax in figure.axes if ax.images]


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def test_object_and_rates_are_images_with_the_noise_beside_the_pixels():
    example = np.arange(24.0) / 24  # two images of 3 x 4
    log_alpha = np.linspace(-6.0, 6.0, 48).reshape(2, 24)
    figure = plot_dropout_rates(example, 7, log_alpha, (3, 4))
    shown = images(figure)
    np.testing.assert_array_equal(
        shown[0], np.hstack([example[:12].reshape(3, 4), example[12:].reshape(3, 4)])
    )
    kept = log_alpha < 3
    for values, image in zip(log_alpha, shown[1:], strict=False):
        flat = np.hstack([np.ravel(image[:, :4]), np.ravel(image[:, 4:])])
        np.testing.assert_array_equal(flat[values < 3], values[values < 3])
        assert (flat[values >= 3] > 3).all()  # beyond the scale
    assert titles(figure)[:3] == [
        "an object of class 7 with noise",
        f"0: {kept[0].sum()} left",
        f"1: {kept[1].sum()} left",
    ]
    assert f"{kept.sum()} of 48 weights left" in figure.get_suptitle()


def test_without_noise_and_with_all_pruned_it_is_drawn_too(tmp_path):
    figure = plot_dropout_rates(np.zeros(12), 0, np.full((7, 12), np.inf), (3, 4))
    assert titles(figure)[0] == "an object of class 0"
    assert len(images(figure)) == 1 + 7
    figure.savefig(tmp_path / "picture.png")


@pytest.mark.parametrize(("example", "log_alpha"), [((12,), (2, 13)), ((13,), (2, 13))])
def test_shapes_that_do_not_fit_are_refused(example, log_alpha):
    with pytest.raises(ValueError, match=r"a multiple of 12.*\(3, 4\)"):
        plot_dropout_rates(np.zeros(example), 0, np.zeros(log_alpha), (3, 4))
