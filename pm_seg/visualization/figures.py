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
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .panels import CYCLE, SCORE_COLOURS, Panel

_DPI = 100
_FONT = 11
# Of panels, in pixels: widths that stay as they are, distance, title.
_NARROW, _WIDE, _GAP, _HEAD = 280, 360, 8, 32


def _figure(width: float, height: float, **options) -> Figure:
    """An empty figure that can be drawn without a display; in inches."""
    figure = Figure(figsize=(width, height), dpi=_DPI, **options)
    FigureCanvasAgg(figure)
    return figure


def panel_figure(
    panels: Sequence[Panel],
    columns: int = 4,
    legend: Mapping[str, Sequence[float]] | None = None,
    score_bar: bool = False,
) -> Figure:
    """Panels in rows, each below its title; room is for the first one's shape.

    Args:
        panels (Sequence[Panel]): At least one.
        columns (int): Panels in a row. Defaults to 4.
        legend (Mapping, optional): Colours, RGB from 0 to 1, by name.
        score_bar (bool): Whether to show the scale of
            :func:`~pm_seg.visualization.panels.score_panels`.
    """
    columns = min(columns, len(panels))
    # Pixel by pixel: a figure that is scaled loses the outlines of tokens.
    wide = min(max(panels[0].image.shape[1], _NARROW), _WIDE)
    images = [_resized(panel.image, wide) for panel in panels]
    tall = len(images[0])
    width = columns * (wide + _GAP) + _GAP
    per_line = lines = 0
    if legend:
        per_line = max(width // (10 * max(map(len, legend)) + 50), 1)
        lines = -(-len(legend) // per_line)
    foot = 26 * lines + 44 * score_bar + 6
    height = -(-len(panels) // columns) * (_HEAD + tall) + foot
    figure = _figure(width / _DPI, height / _DPI)

    def axes(left: float, bottom: float, wide: float, tall: float) -> Axes:
        place = left / width, bottom / height, wide / width, tall / height
        return figure.add_axes(place)

    for index, (panel, image) in enumerate(zip(panels, images)):
        row, column = divmod(index, columns)
        left = _GAP + column * (wide + _GAP)
        bottom = height - (row + 1) * (_HEAD + tall)
        axis = axes(left, bottom, wide, tall)
        axis.set_axis_off()
        axis.imshow(image, interpolation='nearest')
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
        bar = figure.colorbar(
            ScalarMappable(cmap=SCORE_COLOURS),
            cax=axes(width / 2 - 70, 28, 140, 12),
            orientation='horizontal',
            ticks=[0, 1],
        )
        bar.ax.set_xticklabels(['0', '99th percentile'], fontsize=_FONT)
        bar.outline.set_visible(False)
    return figure


def _resized(image: np.ndarray, width: int) -> np.ndarray:
    height = max(round(image.shape[0] * width / image.shape[1]), 1)
    shrinks = width < image.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
    return cv2.resize(image, (width, height), interpolation=method)


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
    styles = dict(marker=list('osD^v*'), linestyle=['-', '--', '-.'] * 2)
    axis.set_prop_cycle(color=CYCLE, **styles)
    for name, values in series.items():
        axis.plot(values, markersize=5, label=name)
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
    figure = _figure(9.0, 3.4, layout='constrained')
    shown, axis = figure.subplots(1, 2, width_ratios=(1, 1.6))
    shown.imshow(image)
    shown.set_axis_off()
    where = np.arange(len(ranking))
    for number, name in enumerate(('dense', 'compressed')):
        bars = axis.barh(
            where + (number - 0.5) * 0.4,
            [100 * row[1 + number] for row in ranking],
            0.36,
            color=CYCLE[number],
            label=name,
        )
        axis.bar_label(bars, fmt='%.1f', padding=2, fontsize=_FONT - 2)
    names = [textwrap.shorten(name, 28) for name, _, _ in ranking]
    axis.set_yticks(where, names, fontsize=_FONT)
    axis.set(ylim=(len(names) - 0.5, -0.5), xlim=(0, 112))
    axis.set(xticks=range(0, 101, 25), xlabel='probability, %')
    axis.spines[['top', 'right']].set_visible(False)
    figure.legend(
        frameon=False, loc='outside upper right', ncols=2, fontsize=_FONT
    )
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
