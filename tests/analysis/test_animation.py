"""The animation of sparsification."""

from __future__ import annotations

import math
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from bayes_svdo.analysis import Snapshot, animate_sparsification


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


def test_a_frame_shows_the_weights_of_its_snapshot(tmp_path, monkeypatch, drawn_tiles, ranked):
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


def test_an_animation_leaves_no_trace(tmp_path):
    settings, open_figures = dict(mpl.rcParams), plt.get_fignums()
    animate_sparsification(make_snapshots(2), tmp_path / "a.gif")
    assert dict(mpl.rcParams) == settings
    assert plt.get_fignums() == open_figures
