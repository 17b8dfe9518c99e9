"""What all pictures share: they leave no trace, go where they are told, and are shown."""

from __future__ import annotations

import gc
import weakref

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bayes_svdo.analysis import (
    plot_log_alpha,
    plot_training,
    plot_weights,
    plot_weights_before_after,
)

# What all have in common.

DRAWINGS = {
    "training": lambda posterior: plot_training(posterior.history),
    "log_alpha": plot_log_alpha,
    "weights": lambda posterior: plot_weights(posterior).figure,
    "before_after": plot_weights_before_after,
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_pictures_render_and_leave_no_trace(draw, posterior, render):
    settings, open_figures = dict(mpl.rcParams), plt.get_fignums()
    figure = draw(posterior)
    assert render(figure).startswith(b"\x89PNG")
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == open_figures
    alive = weakref.ref(figure)
    del figure
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_where_pyplot_has_a_screen_it_shows_the_picture(draw, posterior, monkeypatch):
    """And loads its backend, which makes settings that must last, outside of our style."""
    settings, seen = dict(mpl.rcParams), []
    make = plt.figure

    def spy(**arguments):
        seen.append(dict(mpl.rcParams))
        return make(**arguments)

    monkeypatch.setattr(plt, "figure", spy)
    monkeypatch.setattr(mpl, "get_backend", lambda: "module://matplotlib_inline.backend_inline")
    figure = draw(posterior)
    try:
        assert plt.fignum_exists(figure.number)
        assert seen == [settings]
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
def test_pictures_of_several_panels_are_drawn_into_the_figure_given(draw, posterior, render):
    whole = Figure(layout="constrained", figsize=(12, 5))
    left, right = whole.subfigures(1, 2)
    assert draw(posterior, right) is right
    assert right.axes
    assert not left.axes
    render(whole)
