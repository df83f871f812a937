"""Pictures of token groups and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_groups(image: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Paint each token group in its mean colour, outlined.

    Args:
        image (np.ndarray): uint8, (H, W, 3).
        group (np.ndarray): Group of each token, (h, w); pruned tokens, -1,
            are shown dark.

    Returns:
        np.ndarray: uint8, (H, W, 3).
    """
    size = image.shape[1::-1]
    full = cv2.resize(
        group.astype(np.int32).astype(np.float32),
        size,
        interpolation=cv2.INTER_NEAREST,
    ).astype(np.int64)
    index = (full + 1).ravel()
    count = np.bincount(index).clip(1)
    channels = [
        (np.bincount(index, image[..., c].ravel()) / count)[index]
        for c in range(3)
    ]
    out = np.stack(channels, -1).reshape(image.shape)
    out[full < 0] *= 0.3
    border = np.zeros(full.shape, bool)
    border[:, 1:] |= full[:, 1:] != full[:, :-1]
    border[1:] |= full[1:] != full[:-1]
    out[border] = 255
    return out.astype(np.uint8)


def paint_labels(
    labels: np.ndarray, palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """Class indices (H, W) to colours; others (255: ignored) are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[labels.astype(np.uint8)]


def save_panels(
    path: str | Path,
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
) -> None:
    """Write a grid of RGB images with column titles as a PNG.

    Args:
        path (str | Path): File to write.
        rows (Sequence): Images (H, W, 3) of each row, one for each title.
        titles (Sequence[str]): Column titles.
    """
    heights = [row[0].shape[0] / row[0].shape[1] for row in rows]
    width = 2.6
    figure = Figure(
        figsize=(width * len(titles), width * sum(heights) + 0.4), dpi=110
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(rows),
        len(titles),
        squeeze=False,
        gridspec_kw={'height_ratios': heights},
    )
    for line, images in zip(axes, rows):
        for axis, image in zip(line, images):
            axis.imshow(image)
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path)
