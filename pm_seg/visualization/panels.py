"""Images of token groups, scores, labels and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from matplotlib import colormaps

#: Okabe and Ito's colours, which people with colour-blindness tell apart.
ORANGE, BLUE, GREEN, VERMILION = '#E69F00', '#0072B2', '#009E73', '#D55E00'
SKY, PURPLE, YELLOW = '#56B4E9', '#CC79A7', '#F0E442'
CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION)

#: About how wide panels of tokens are, in pixels.
_WIDTH = 320

#: Scores from dark to light, also readable in grey.
SCORE_COLOURS = 'cividis'


class Panel(NamedTuple):
    """An image with what it shows.

    Attributes:
        title (str): Short.
        image (np.ndarray): RGB, uint8, (H, W, 3).
    """

    title: str
    image: np.ndarray


def rgb(colour: str) -> tuple[int, int, int]:
    """'#E69F00' as numbers."""
    return tuple(bytes.fromhex(colour[1:]))


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
    light = out.mean(-1) > 205
    out[border & ~light] = 255
    out[border & light] = 90
    return out.astype(np.uint8)


def _cell(columns: int) -> int:
    """Side of a token in pixels, whole, so that no outline gets lost."""
    return max(round(_WIDTH / columns), 4)


def group_panels(
    image: np.ndarray,
    groups: Mapping[str, Sequence[np.ndarray]],
    patch: int,
) -> list[Panel]:
    """The groups of every layer of every module, drawn over an image.

    Args:
        image (np.ndarray): What the model sees, RGB, uint8, (H, W, 3).
        groups (Mapping): Group of each token, (h, w), by layer, by name of
            the module.
        patch (int): Side of a token in pixels. An image that is no whole
            number of tokens was padded right and below.
    """
    panels = []
    height, width = image.shape[:2]
    named = [(name, *x) for name in groups for x in enumerate(groups[name])]
    for name, index, group in named:
        live = group[group >= 0]
        count, total = len(np.unique(live)), group.size
        title = f'{name} {index}: '
        title += 'dense' if count == total else f'{count} of {total}'
        if live.size < total:
            title += f', {total - live.size} pruned'
        rows, columns = group.shape
        below = max(rows * patch - height, 0)
        right = max(columns * patch - width, 0)
        drawn = np.pad(image, ((0, below), (0, right), (0, 0)), 'edge')
        cell = _cell(columns)
        size = (columns * cell, rows * cell)
        drawn = cv2.resize(drawn, size, interpolation=cv2.INTER_AREA)
        if count < total:
            drawn = draw_groups(drawn, group)
        shown = drawn[: height * cell // patch, : width * cell // patch]
        panels.append(Panel(title, shown))
    return panels


def score_panels(scores: Mapping[str, np.ndarray]) -> list[Panel]:
    """Scores as heat maps, from 0 to each layer's 99th percentile.

    Args:
        scores (Mapping): (layers, h, w) by name of the module. Layers that
            are all zero, because they were not scored, are left out.
    """
    panels = []
    for name, layers in scores.items():
        for index, values in enumerate(layers):
            if not values.any():
                continue
            top = np.quantile(values, 0.99) or values.max()
            shown = colormaps[SCORE_COLOURS]((values / top).clip(0, 1))
            shown = (shown[..., :3] * 255).round().astype(np.uint8)
            cell = _cell(values.shape[1])
            shown = shown.repeat(cell, 0).repeat(cell, 1)
            panels.append(Panel(f'{name} {index}', shown))
    return panels


def paint_labels(
    labels: np.ndarray, palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """Class indices (H, W) to colours; others (255: ignored) are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    return table[labels.astype(np.uint8)]


#: What a pixel that changed is painted in, and what that means.
CHANGED = {'changed': VERMILION}
JUDGED = {
    'now wrong': VERMILION,
    'now right': BLUE,
    'wrong before and after': YELLOW,
}


def draw_difference(
    image: np.ndarray,
    dense: np.ndarray,
    compressed: np.ndarray,
    truth: np.ndarray | None = None,
    ignored: int = 255,
) -> np.ndarray:
    """Where two predictions differ, over a pale grey image.

    Args:
        image (np.ndarray): RGB, uint8, (H, W, 3).
        dense, compressed (np.ndarray): Class indices, (H, W).
        truth (np.ndarray, optional): The annotation, (H, W). With it,
            changes are told apart as in :data:`JUDGED`; without, they all
            have the colour of :data:`CHANGED`.
        ignored (int): Class of pixels without annotation. Defaults to 255.

    Returns:
        np.ndarray: uint8, (H, W, 3).
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    out = np.repeat((110 + 0.5 * grey)[..., None], 3, 2).astype(np.uint8)
    changed = dense != compressed
    if truth is None:
        out[changed] = rgb(VERMILION)
        return out
    changed &= truth != ignored
    for name, where in (
        ('wrong before and after', changed),
        ('now wrong', changed & (dense == truth)),
        ('now right', changed & (compressed == truth)),
    ):
        out[where] = rgb(JUDGED[name])
    return out


def prediction_panels(
    image: np.ndarray,
    dense: np.ndarray,
    compressed: np.ndarray,
    palette: Sequence[Sequence[int]],
    truth: np.ndarray | None = None,
) -> list[Panel]:
    """Image, annotation if given, both predictions and their difference.

    Args:
        image (np.ndarray): RGB, uint8, (H, W, 3).
        dense, compressed (np.ndarray): Class indices, (H, W).
        palette (Sequence): RGB colour of each class.
        truth (np.ndarray, optional): The annotation, (H, W).
    """
    maps = {'annotation': truth, 'dense': dense, 'compressed': compressed}
    share = (dense != compressed).mean()
    return [
        Panel('image', image),
        *(
            Panel(title, paint_labels(labels, palette))
            for title, labels in maps.items()
            if labels is not None
        ),
        Panel(
            f'difference: {share:.1%} of the pixels',
            draw_difference(image, dense, compressed, truth),
        ),
    ]


def make_palette(num_classes: int) -> list[list[int]]:
    """Colours for a dataset that brings none, light and dark in turns."""
    hues = np.arange(num_classes) * 0.618034 % 1.0
    colours = colormaps['turbo'](hues)[:, :3]
    colours[1::2] *= 0.6
    return (colours * 255).round().astype(int).tolist()
