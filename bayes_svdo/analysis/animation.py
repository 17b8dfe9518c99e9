"""An animation of weights as they go."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from bayes_svdo.analysis.figures import Array, array, compressed, label_of, styled
from bayes_svdo.analysis.snapshots import Snapshot
from bayes_svdo.analysis.weight_images import (
    busiest,
    colour_limit,
    draw_colorbar,
    draw_mosaic,
    mosaic,
    mosaic_size,
    noun_of,
    tiles_of,
)
from bayes_svdo.inference.arguments import check_rate

_MAX_FPS = 50
_HOLD = 3000  # ms that the last frame stands


def animate_sparsification(
    snapshots: Sequence[Snapshot],
    path: str | os.PathLike[str],
    image_shape: Sequence[int] | None = None,
    *,
    fps: float = 8.0,
    count: int | None = 60,
) -> Path:
    """Write a GIF of a layer's weights as they go: a frame per snapshot, the last one held.

    Args:
        snapshots: What ``Snapshots`` kept of a run.
        path: The file; one that is there is replaced when the new one is complete.
        image_shape: As for :func:`plot_weights`.
        fps: Frames per second, at most 50. GIF counts time in hundredths of a second.
        count: As for :func:`plot_weights`; the units are chosen by the last snapshot, and stand
            in their own order.

    Returns:
        The path.

    Raises:
        ValueError: There are no snapshots, or of several sites; ``path`` does not end in ``.gif``;
            ``fps``, ``count`` or ``image_shape`` is not as it should be.
    """
    target = Path(path)
    if target.suffix.lower() != ".gif":
        raise ValueError(f'path must end in ".gif", but is "{target}".')
    if check_rate("fps", fps) > _MAX_FPS:
        raise ValueError(f"fps must be at most {_MAX_FPS}, which browsers can show, but is {fps}.")
    frames = _frames(snapshots, image_shape, count)
    frame = 10 * round(100 / fps)
    durations = [*[frame] * (len(frames) - 1), max(frame, _HOLD)]
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.stem}-{secrets.token_hex(4)}.gif")
    try:
        frames[0].save(
            unfinished, save_all=True, append_images=frames[1:], duration=durations, loop=0
        )
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


# Animation.


def _frames(
    snapshots: Sequence[Snapshot], image_shape: Sequence[int] | None, count: int | None
) -> list[Image.Image]:
    if not len(snapshots):
        raise ValueError(
            "there are no snapshots, so there is nothing to animate.\n"
            "  Try snapshots = Snapshots(); fit(..., callbacks=[snapshots])."
        )
    sites = list(dict.fromkeys(snapshot.site for snapshot in snapshots))
    if len(sites) > 1:
        raise ValueError(f"snapshots must be of one site, but are of {', '.join(sites)}.")
    tiles = [tiles_of(array(snapshot.weights), image_shape, sites[0]) for snapshot in snapshots]
    chosen = np.sort(busiest(tiles[-1], count))
    width, height = mosaic_size(tiles[-1][chosen])
    size = width + 0.6, height + 0.3
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    canvas = FigureCanvasAgg(figure)
    with styled(figure, size):
        ax = figure.subplots()
        image = draw_mosaic(ax, tiles[0][chosen], colour_limit(tiles[-1]))
        draw_colorbar(image, [ax], *tiles)
        title = figure.suptitle(" \n ", x=0.01, ha="left")
        drawn = []
        for snapshot, weights in zip(snapshots, tiles, strict=True):
            image.set_data(mosaic(weights[chosen]))
            title.set_text(_frame_title(snapshot, weights, chosen))
            canvas.draw()
            drawn.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    return _with_one_palette(drawn)


def _frame_title(snapshot: Snapshot, tiles: Array, chosen: NDArray[np.intp]) -> str:
    noun = noun_of(snapshot.weights.dim())
    shown = f"{len(chosen)} of {len(tiles):,}" if len(chosen) < len(tiles) else "all"
    title = (
        f"epoch {snapshot.epoch}: {np.count_nonzero(tiles):,} of {tiles.size:,} weights left in "
        f"{label_of(snapshot.site)} ({shown} {noun} shown)\n"
        f"network {compressed(snapshot.compression)}"
    )
    if snapshot.metric is None:
        return title
    name, value = snapshot.metric
    number = f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.3g}"
    return f"{title}, {name.replace('_', ' ')} {number}"


def _with_one_palette(frames: list[Image.Image]) -> list[Image.Image]:
    """Frames of 256 colours, the same in all: what does not move takes no room in the file."""
    samples = [frames[index] for index in {0, len(frames) // 2, len(frames) - 1}]
    strip = Image.new("RGB", (frames[0].width, sum(sample.height for sample in samples)))
    for index, sample in enumerate(samples):
        strip.paste(sample, (0, index * sample.height))
    palette = strip.quantize(256, dither=Image.Dither.NONE)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
