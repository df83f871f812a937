"""Images of token groups, scores, labels and differences.

Images are RGB, uint8, (H, W, 3), maps of classes (H, W).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import mmcv
import numpy as np
from matplotlib import colormaps

#: Okabe and Ito's colours, which people with colour-blindness tell apart.
ORANGE, BLUE, GREEN, VERMILION = '#E69F00', '#0072B2', '#009E73', '#D55E00'
SKY, PURPLE, YELLOW = '#56B4E9', '#CC79A7', '#F0E442'
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)

#: What a pixel that changed is painted in, and what that means; with an
#: annotation, and without.
JUDGED = {
    'now wrong': VERMILION,
    'now right': BLUE,
    'wrong before and after': YELLOW,
}
CHANGED = {'changed': VERMILION}

#: Scores from dark to light, also readable in grey.
SCORE_COLOURS = 'cividis'

_IGNORED = 255


class Panel(NamedTuple):
    """An image with a short title."""

    title: str
    image: np.ndarray


def rgb(colour: str) -> tuple[int, int, int]:
    """'#E69F00' as numbers."""
    return tuple(bytes.fromhex(colour[1:]))


def draw_groups(image: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Paint each token group, (h, w), in its mean colour, outlined.

    The image has a whole number of pixels for each token; pruned ones, -1,
    are shown dark.
    """
    rows, columns = np.divide(image.shape[:2], group.shape).astype(int)
    full = group.repeat(rows, 0).repeat(columns, 1)
    index = full.ravel() + 1
    sums = [np.bincount(index, image[..., c].ravel()) for c in range(3)]
    means = np.stack(sums, 1) / np.bincount(index).clip(1)[:, None]
    out = means[index].reshape(image.shape)
    out[full < 0] *= 0.3
    border = np.zeros(full.shape, bool)
    border[:, 1:] |= full[:, 1:] != full[:, :-1]
    border[1:] |= full[1:] != full[:-1]
    light = out.mean(-1) > 205
    out[border & ~light] = 255
    out[border & light] = 90
    return out.astype(np.uint8)


def _cell(columns: int) -> int:
    """Side of a token in pixels, whole, so that no outline gets lost."""
    return max(round(320 / columns), 4)


def group_panel(
    name: str, image: np.ndarray, group: np.ndarray, patch: int
) -> Panel:
    """The groups of the layer ``name``, drawn over what the model sees.

    Args:
        image (np.ndarray): No whole number of tokens if it was padded right
            and below.
        group (np.ndarray): Group of each token, (h, w), -1 if pruned.
        patch (int): Side of a token in pixels.
    """
    live = group[group >= 0]
    count, total = len(np.unique(live)), group.size
    kept = 'dense' if count == total else f'{count} of {total}'
    pruned = f', {total - live.size} pruned' if live.size < total else ''
    height, width = image.shape[:2]
    rows, columns = group.shape
    whole, cell = (rows * patch, columns * patch), _cell(columns)
    drawn = mmcv.impad(image, shape=whole, padding_mode='edge')
    size = (columns * cell, rows * cell)
    drawn = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA)
    if count < total:
        drawn = draw_groups(drawn, group)
    shown = drawn[: height * cell // patch, : width * cell // patch]
    return Panel(f'{name}: {kept}{pruned}', shown)


def score_panels(scores: Mapping[str, np.ndarray]) -> list[Panel]:
    """Scores, (layers, h, w) by name of the module, as heat maps.

    From 0 to each layer's 99th percentile. Layers that are all zero, because
    they were not scored, are left out.
    """
    panels = []
    named = [(name, *x) for name in scores for x in enumerate(scores[name])]
    for name, index, values in named:
        if values.any():
            top = np.quantile(values, 0.99) or values.max()
            shown = colormaps[SCORE_COLOURS](values / top, bytes=True)[..., :3]
            cell = _cell(values.shape[1])
            shown = shown.repeat(cell, 0).repeat(cell, 1)
            panels.append(Panel(f'{name} {index}', shown))
    return panels


def paint_labels(
    labels: np.ndarray, palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """Classes as colours; those without one (255: ignored) are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[labels.astype(np.uint8)]


def draw_difference(
    image: np.ndarray,
    dense: np.ndarray,
    compressed: np.ndarray,
    truth: np.ndarray | None = None,
) -> np.ndarray:
    """Where two maps of classes differ, over the pale grey image.

    In the colour of :data:`CHANGED`; with an annotation in those of
    :data:`JUDGED`, where it has a class.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    out = np.repeat((110 + 0.5 * grey)[..., None], 3, 2).astype(np.uint8)
    changed = dense != compressed
    if truth is None:
        out[changed] = rgb(VERMILION)
        return out
    changed &= truth != _IGNORED
    for name, where in (
        ('wrong before and after', changed),
        ('now wrong', changed & (dense == truth)),
        ('now right', changed & (compressed == truth)),
    ):
        out[where] = rgb(JUDGED[name])
    return out


def make_palette(num_classes: int) -> list[list[int]]:
    """Colours for a dataset that brings none, light and dark in turns."""
    hues = np.arange(num_classes) * 0.618034 % 1.0
    colours = colormaps['turbo'](hues)[:, :3]
    colours[1::2] *= 0.6
    return (colours * 255).round().astype(int).tolist()
