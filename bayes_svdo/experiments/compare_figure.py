"""The poster's figure: an object with its noise, and the trained dropout rates of every class."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from bayes_svdo.analysis.figures import SHADE, TICK_SIZE, Array, Canvas, styled

_MOST_COLUMNS = 5
# So much of the scale is for the relevant weights; the few beyond it would bleach the others.
_COLOUR_QUANTILE = 0.02


def plot_dropout_rates(
    example: Array,  # (D,)
    label: int,
    log_alpha: Array,  # (classes, D)
    image_shape: tuple[int, int],
    *,
    threshold: float = 3.0,
    figure: Canvas | None = None,
) -> Canvas:
    """Draw an object beside ``log alpha`` of each class's weights, all as images.

    Args:
        example: Features of the object, one or several images side by side.
        label: Its class.
        log_alpha: Log dropout rate of every class's weight of every feature; inf where pruned.
        image_shape: ``(height, width)`` of one image; ``D`` is a multiple of their product.
        threshold: Weights with ``log_alpha`` from here on are pruned, and drawn grey.
        figure: Where to draw; a new figure if None.

    Raises:
        ValueError: The shapes do not fit.
    """
    size = image_shape[0] * image_shape[1]
    if log_alpha.ndim != 2 or example.shape != log_alpha.shape[1:] or example.size % size:
        raise ValueError(
            f"example must have shape (D,) and log_alpha (classes, D), D a multiple of {size} for "
            f"image_shape={image_shape}, but they are {example.shape} and {log_alpha.shape}."
        )
    blocks = example.size // size
    aspect = blocks * image_shape[1] / image_shape[0]
    columns = min(len(log_alpha), _MOST_COLUMNS)
    rows = -(-len(log_alpha) // columns)
    wide = 0.5 + 0.42 * aspect  # of one class, in inches
    size_in_inches = (2.0 * wide + columns * wide + 1.2, rows * (wide / aspect + 0.42) + 0.45)
    kept = log_alpha[log_alpha < threshold]
    lowest = float(np.quantile(kept, _COLOUR_QUANTILE)) if kept.size else threshold - 1.0
    with styled(figure, size_in_inches) as canvas:
        grid = canvas.add_gridspec(rows, columns + 1, width_ratios=[1.8, *[1.0] * columns])
        ax = canvas.add_subplot(grid[:, 0])
        _image(ax, example, image_shape, cmap="gray_r", vmin=0.0, vmax=1.0)
        ax.set_title(f"an object of class {label}" + (" with noise" if blocks > 1 else ""))
        colours = mpl.colormaps["viridis"].with_extremes(over=SHADE)
        axes = []
        for index, values in enumerate(log_alpha):
            ax = canvas.add_subplot(grid[index // columns, 1 + index % columns])
            shown = np.where(values < threshold, values, threshold + 1.0)
            image = _image(ax, shown, image_shape, cmap=colours, vmin=lowest, vmax=threshold)
            ax.set_title(f"{index}: {np.count_nonzero(values < threshold)} left")
            axes.append(ax)
        bar = canvas.colorbar(image, ax=axes, label="log α", extend="both", aspect=25, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=TICK_SIZE)
        canvas.suptitle(
            f"Trained dropout rates per class: {kept.size:,} of {log_alpha.size:,} weights left; "
            f"grey where pruned (log α ≥ {threshold:g})",
            x=0.01,
            ha="left",
        )
    return canvas


def _image(ax: Axes, values: Array, image_shape: tuple[int, int], **style: Any) -> Any:
    """Images side by side, with a line between them."""
    height, width = image_shape
    images = values.reshape(-1, height, width)
    image = ax.imshow(np.concatenate(list(images), axis=1), interpolation="nearest", **style)
    for index in range(1, len(images)):
        ax.axvline(index * width - 0.5, color="black", lw=0.8)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set(visible=True, linewidth=0.6)
    return image
