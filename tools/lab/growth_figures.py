"""What ``growth.py`` measured, as a table and as pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table


def exponent_table(summary: list[dict]) -> Table:
    """Exponents of time (and memory) by tokens, depth and batch."""
    size = summary[0]['size']
    out = Table(
        title='Exponents of time / memory, and both at the largest size'
    )
    heads = ('', 'tokens', 'depth', 'batch', f's at {size}', 'MiB')
    for head in heads:
        out.add_column(head, justify='right' if head else 'left')
    for row in summary:
        out.add_row(
            row['quantity'],
            f'{_number(row["seconds_by_size"])} / '
            f'{_number(row["mib_by_size"])}',
            _number(row['seconds_by_depth']),
            _number(row['seconds_by_batch']),
            f'{row["seconds"]:.3f}',
            f'{row["mib"]:.0f}',
        )
    return out


def _number(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.2f}'


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory by size, depth and batch, on logarithmic axes."""
    figure = Figure(figsize=(12.5, 7.2), dpi=100)
    axes = figure.subplots(2, 3, sharex='col')
    names = list(dict.fromkeys(row['quantity'] for row in rows))
    labels = dict(
        size='patch tokens (images of 256 to 2048 pixels)',
        depth='layers (512 pixels)',
        batch='images in a batch (256 pixels)',
    )
    for column, (along, label) in zip(axes.T, labels.items()):
        x = 'tokens' if along == 'size' else along
        for axis, value in zip(column, ('seconds', 'mib')):
            for index, name in enumerate(names):
                own = [
                    row
                    for row in rows
                    if (row['quantity'], row['along']) == (name, along)
                ]
                bare = 'left out' in name
                axis.plot(
                    [row[x] for row in own],
                    [max(row[value], 1e-2 * (value == 'mib')) for row in own],
                    'o--' if bare else 'o-',
                    markersize=3,
                    linewidth=1.2,
                    color=f'C{index}',
                    label=name,
                )
            _guide(axis)
        column[1].set_xlabel(label)
    axes[0, 0].set_ylabel('CPU seconds, one thread')
    axes[1, 0].set_ylabel('peak MiB beyond the model')
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, names, ncols=3, fontsize=8, loc='lower center', frameon=False
    )
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    _save(figure, path)


def _guide(axis: Axes) -> None:
    """Logarithmic axes and a grey line of exponent 1."""
    axis.set_xscale('log', base=2)
    axis.set_yscale('log')
    axis.grid(alpha=0.25)
    lines = [line.get_xydata() for line in axis.get_lines()]
    points = [line for line in lines if len(line)]
    if not points:
        return
    left = min(line[0, 0] for line in points)
    right = max(line[-1, 0] for line in points)
    low = np.exp(np.mean([np.log(line[0, 1]) for line in points]))
    axis.plot(
        [left, right],
        [low, low * right / left],
        color='0.6',
        linestyle=':',
        label='linear',
    )


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_leak(result: dict, path: Path) -> None:
    """Resident memory, by image."""
    figure = Figure(figsize=(8, 3.6), dpi=100)
    axis = figure.subplots()
    axis.plot(result['mib'], color='C0', linewidth=1)
    axis.set_xlabel('images of mixed sizes')
    axis.set_ylabel('resident memory, MiB')
    axis.set_ylim(0, max(result['mib']) * 1.1)
    axis.grid(alpha=0.25)
    figure.tight_layout()
    _save(figure, path)
