"""What a benchmark measured, as tables and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

_COLUMNS = (
    '', 'layers', 'GMACs', 'ms', '+-', 'img/s', 'speed', 'of ideal', 'GiB'
)  # fmt: skip


def table(rows: Sequence[dict]) -> Table:
    """Rows of one setting as a table that fits 80 columns.

    'layers' is the cost of the layers as a share of the dense ones', 'GMACs'
    that of the whole model, 'of ideal' the share of the speed that fewer
    operations promise.
    """
    first = rows[0]
    what = 'training step' if first['train'] else 'inference'
    place = ' on the CPU' if first['mode'] == 'onnx' else ''
    out = Table(
        title=f'{what}, {first["mode"]}{place}, '
        f'{first.get("precision", first["dtype"])}, batch '
        f'{first["batch_size"]} of {"x".join(map(str, first["size"]))}',
        padding=(0, 1),
    )
    for head in _COLUMNS:
        out.add_column(head, justify='right' if head else 'left')
    for row in rows:
        memory = row['peak_gib']
        out.add_row(
            row['method'],
            f'{row["share"]:.0%}',
            f'{row["gmacs"]:.2f}',
            f'{row["latency_ms"]:.1f}',
            f'{row["spread_ms"]:.1f}',
            f'{row["images_per_s"]:.1f}',
            f'{row["speedup"]:.2f}x',
            f'{row["of_ideal"]:.0%}',
            '-' if memory is None else f'{memory:.2f}',
        )
    return out


def plot(rows: Sequence[dict], path: Path) -> None:
    """Images per second by GMACs, one panel for each setting."""
    settings: dict[tuple, list[dict]] = {}
    for row in rows:
        key = row['mode'], row['precision'], row['batch_size']
        settings.setdefault(key, []).append(row)
    figure = Figure(figsize=(4.2 * len(settings), 3.6), dpi=110)
    axes = figure.subplots(1, len(settings), squeeze=False)[0]
    for axis, (key, group) in zip(axes, settings.items()):
        dense = group[0]
        ideal = dense['images_per_s'] * dense['gmacs']
        span = sorted(row['gmacs'] for row in group)
        axis.plot(
            span,
            [ideal / g for g in span],
            color='0.6',
            linestyle='--',
            label='dense, scaled by GMACs',
        )
        for row, marker in zip(group, 'osD^v*'):
            axis.plot(
                row['gmacs'],
                row['images_per_s'],
                marker,
                markersize=8,
                label=row['method'],
            )
        axis.set_title(f'{key[0]}, {key[1]}, batch {key[2]}')
        axis.set_xlabel('GMACs per image')
        axis.set_ylabel('images per second')
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
