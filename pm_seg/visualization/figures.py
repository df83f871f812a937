"""Figures of pictures and curves, drawn without a display."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .panels import CYCLE, SCORE_COLOURS, Panel

_DPI = 100
_FONT = 11
# Of panels, in pixels: widths that stay as they are, distance, title.
_NARROW, _WIDE, _GAP, _HEAD = 280, 360, 8, 32


def _figure(width: float, height: float) -> Figure:
    """An empty figure that can be drawn without a display; in inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def panel_figure(
    panels: Sequence[Panel],
    columns: int = 4,
    legend: Mapping[str, Sequence[float]] | None = None,
    score_bar: bool = False,
) -> Figure:
    """Panels in rows, each below its title.

    Args:
        panels (Sequence[Panel]): At least one.
        columns (int): Panels in a row. Defaults to 4.
        legend (Mapping, optional): Colours, RGB from 0 to 1, by name, shown
            below the panels.
        score_bar (bool): Whether to show the scale of
            :func:`~pm_seg.visualization.score_panels` below the panels.

    Returns:
        Figure: To be passed to :func:`save_figure` or :func:`to_array`.
    """
    columns = min(columns, len(panels))
    # Pixel by pixel: a figure that is scaled loses the outlines of tokens.
    wide = panels[0].image.shape[1]
    wide = min(max(wide, _NARROW), _WIDE)
    images = [_resized(panel.image, wide) for panel in panels]
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    tall = [_HEAD + max(map(len, row)) for row in rows]
    width = columns * (wide + _GAP) + _GAP
    per_line = lines = 0
    if legend:
        per_line = max(width // (10 * max(map(len, legend)) + 50), 1)
        lines = -(-len(legend) // per_line)
    foot = 26 * lines + 44 * score_bar + 6
    height = sum(tall) + foot
    figure = _figure(width / _DPI, height / _DPI)

    def axes_at(left: float, bottom: float, wide: int, tall: int) -> Axes:
        place = left / width, bottom / height, wide / width, tall / height
        axis = figure.add_axes(place)
        axis.set_axis_off()
        return axis

    for number, (panel, image) in enumerate(zip(panels, images)):
        row, column = divmod(number, columns)
        left = _GAP + column * (wide + _GAP)
        bottom = height - sum(tall[:row]) - _HEAD - len(image)
        axis = axes_at(left, bottom, wide, len(image))
        axis.imshow(image, interpolation='nearest', aspect='auto')
        axis.set_title(panel.title, fontsize=_FONT, pad=4)
    if legend:
        figure.legend(
            handles=[
                Patch(facecolor=colour, edgecolor='0.3', label=name)
                for name, colour in legend.items()
            ],
            loc='lower center',
            ncols=min(per_line, len(legend)),
            fontsize=_FONT,
            frameon=False,
            borderaxespad=0.1,
            handlelength=1.2,
            columnspacing=1.4,
        )
    if score_bar:
        axis = axes_at(width / 2 - 110, 18, 140, 12)
        axis.imshow(np.linspace(0, 1, 256)[None], SCORE_COLOURS, aspect='auto')
        style = dict(va='center', transform=axis.transAxes, fontsize=_FONT)
        axis.text(-0.04, 0.5, '0', ha='right', **style)
        axis.text(1.04, 0.5, '99th percentile', ha='left', **style)
    return figure


def _resized(image: np.ndarray, width: int) -> np.ndarray:
    """The image at another width."""
    if image.shape[1] == width:
        return image
    size = width, max(round(image.shape[0] * width / image.shape[1]), 1)
    shrinks = width < image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
    return cv2.resize(image, size, interpolation=method)


def depth_figure(
    series: Mapping[str, Sequence[float]],
    label: str,
    full: float | None = None,
) -> Figure:
    """Values by layer, as steps, one line for each name.

    Args:
        series (Mapping): A value for each layer, by name.
        label (str): Of the vertical axis.
        full (float, optional): Upper limit, drawn as the dense model's line.
    """
    figure = _figure(4.6, 2.9)
    axis = figure.subplots()
    if full is not None:
        axis.axhline(full, color='0.45', linestyle=':', linewidth=1.5)
        axis.annotate(
            'dense', (1, full), (-4, -4), color='0.3', ha='right', va='top',
            xycoords=('axes fraction', 'data'), textcoords='offset points',
        )  # fmt: skip
    for number, (name, values) in enumerate(series.items()):
        axis.plot(
            range(len(values)),
            values,
            marker='osD^v*'[number % 6],
            markersize=5,
            color=CYCLE[number % len(CYCLE)],
            linestyle=('-', '--', '-.')[number % 3],
            label=name,
        )
    axis.set(xlabel='layer', ylabel=label)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[['top', 'right']].set_visible(False)
    axis.grid(axis='y', color='0.9')
    axis.set_axisbelow(True)
    if len(series) > 1:
        axis.legend(frameon=False, loc='best')
    figure.tight_layout(pad=0.5)
    return figure


def ranking_figure(
    image: np.ndarray, ranking: Sequence[tuple[str, float, float]]
) -> Figure:
    """An image beside bars of its likeliest classes.

    Args:
        image (np.ndarray): RGB, uint8, (H, W, 3).
        ranking (Sequence): Class, probability by the dense and by the
            compressed model; the first on top.
    """
    figure = _figure(9.0, 3.4)
    shown = figure.add_axes((0.01, 0.02, 0.33, 0.96))
    shown.imshow(image)
    shown.set_axis_off()
    names = [textwrap.shorten(name, 28) for name, _, _ in ranking]
    left = 0.37 + 0.0088 * max(map(len, names))
    axis = figure.add_axes((left, 0.15, 0.95 - left, 0.72))
    where = np.arange(len(names))
    for number, name in enumerate(('dense', 'compressed')):
        bars = axis.barh(
            where + (number - 0.5) * 0.4,
            [100 * row[1 + number] for row in ranking],
            0.36,
            color=CYCLE[number],
            label=name,
        )
        axis.bar_label(bars, fmt='%.1f', padding=2, fontsize=_FONT - 2)
    axis.set_yticks(where, names, fontsize=_FONT)
    axis.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 112))
    axis.set(xticks=range(0, 101, 25), xlabel='probability, %')
    axis.spines[['top', 'right']].set_visible(False)
    figure.legend(frameon=False, loc='upper right', ncols=2, fontsize=_FONT)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format='png', facecolor='white')


def to_array(figure: Figure) -> np.ndarray:
    """A figure as RGB pixels, uint8, (H, W, 3)."""
    figure.set_facecolor('white')
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def to_svg(figure: Figure) -> str:
    """A figure as SVG; text becomes outlines, the same in every browser."""
    out, meta = io.StringIO(), {'Date': None}
    figure.savefig(out, format='svg', facecolor='white', metadata=meta)
    return out.getvalue()
