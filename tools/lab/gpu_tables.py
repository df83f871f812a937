"""The rows of the GPU report as Markdown tables and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

Rows = Sequence[dict]

#: What the work has to reach, half of the layers' operations, by setting,
#: mode and row: times the speed of the dense model in the same mode.
SPEED_TARGETS = {
    ('Seg-S 512, batch 32', 'eager', 'ours 50%'): 1.75,
    ('Seg-S 512, batch 32', 'compiled', 'ours 50%'): 1.8,
    ('Seg-L 640, batch 8', 'eager', 'ours 50%'): 1.85,
    ('Seg-L 640, batch 8', 'compiled', 'ours 50%'): 1.85,
    ('Seg-S 512, batch 1', 'cudagraph', 'ours 50%'): 1.4,
    ('Seg-L 640, batch 1', 'cudagraph', 'ours 50%'): 1.6,
    ('DeiT-S 224, batch 256', 'eager', 'ours 60%'): 1.4,
    ('DeiT-S 224, batch 256', 'compiled', 'ours 60%'): 1.4,
}
#: mIoU that may be lost against the dense model, fine-tuned alike.
ACCURACY_TARGETS = {'ours 50%': 0.2, 'ours 35%': 0.7, 'ours 25%': 2.0}
#: The model of both axes of the picture.
PICTURED = 'Seg-T 352x480, batch 32'


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    rule = ['---'] + ['---:'] * (len(head) - 1)
    rows = (head, rule, *lines)
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows) + '\n'


def _of(rows: Rows, kind: str) -> list[dict]:
    return [
        row
        for row in rows
        if row['kind'] == kind and not {'error_text', 'unreachable'} & {*row}
    ]


def speeds(rows: Rows) -> dict[tuple, dict[str, dict]]:
    """Rows of each setting, mode and whether it trains, by name; with their
    ratio to dense in 'ratio' and to what operations promise in 'of_ideal'.
    """
    found: dict[tuple, dict[str, dict]] = {}
    for row in _of(rows, 'speed'):
        key = row['setting'], row['mode'], row['train']
        found.setdefault(key, {})[row['row']] = dict(row)
    for group in found.values():
        dense = group.get('dense')
        for row in group.values() if dense else ():
            row['ratio'] = dense['latency_ms'] / row['latency_ms']
            row['of_ideal'] = row['ratio'] * row['gmacs'] / dense['gmacs']
    return found


def speed_table(rows: Rows) -> str:
    """One line for each model, mode and method."""
    lines = []
    for (setting, mode, train), group in speeds(rows).items():
        for name, row in group.items():
            memory, ratio = row['peak_gib'], row.get('ratio')
            lines.append(
                [
                    f'{setting}, {mode}{", training" * train}',
                    name,
                    f'{row["gmacs"]:.1f}',
                    f'{row["images_per_s"]:.0f}',
                    '' if ratio is None else f'{ratio:.2f}x',
                    '' if ratio is None else f'{row["of_ideal"]:.0%}',
                    '' if memory is None else f'{memory:.2f}',
                ]
            )
    head = ('setting', 'row', 'GMACs', 'img/s', 'speed', 'of ideal', 'GiB')
    return markdown(head, lines)


def check_table(rows: Rows) -> str:
    """Errors and groups against the CPU."""
    lines = [
        [
            row['row'],
            f'{row["error"]:.1e}',
            f'{row["same"]:.2%}',
            f'{row["bf16_error"]:.1e}',
            f'{row["bf16_same"]:.2%}',
            'yes' if row['ok'] else '**no**',
        ]
        for row in _of(rows, 'check')
    ]
    head = ('', 'fp32 error', 'same groups', 'bf16', 'same groups', 'passed')
    return markdown(head, lines)


def accuracies(rows: Rows) -> dict[str, tuple[float, float, int]]:
    """Mean mIoU on val and on test, and seeds, of each row."""
    found: dict[str, list[dict]] = {}
    for row in _of(rows, 'accuracy'):
        found.setdefault(row['row'], []).append(row)
    return {
        name: (
            sum(run['val_miou'] for run in runs) / len(runs),
            sum(run['test_miou'] for run in runs) / len(runs),
            len(runs),
        )
        for name, runs in found.items()
    }


def accuracy_tables(rows: Rows) -> str:
    """CamVid, and CIFAR-10 below."""
    camvid = [
        [name, f'{val:.2f}', f'{test:.2f}', str(seeds)]
        for name, (val, test, seeds) in accuracies(rows).items()
    ]
    cifar = [[row['row'], f'{row["top1"]:.2f}'] for row in _of(rows, 'cifar')]
    return '\n'.join(
        (
            markdown(('CamVid', 'val mIoU', 'test mIoU', 'seeds'), camvid),
            markdown(('CIFAR-10', 'top-1'), cifar),
        )
    )


def target_table(rows: Rows) -> str:
    """What was to be reached, and was."""
    lines, measured = [], speeds(rows)
    for (setting, mode, name), least in SPEED_TARGETS.items():
        group = measured.get((setting, mode, False), {})
        ratio = group.get(name, {}).get('ratio')
        lines.append(_verdict(f'{name}, {setting}, {mode}', least, ratio, 'x'))
    for (setting, mode, train), group in measured.items():
        ours, dense = group.get('ours 50%'), group.get('dense')
        if train and ours and dense and dense['peak_gib']:
            share = ours['peak_gib'] / dense['peak_gib']
            what = f'training memory, {setting}, {mode}'
            lines.append(_verdict(what, -0.6, -share, ''))
    found = accuracies(rows)
    for name, most in ACCURACY_TARGETS.items():
        both = 'dense' in found and name in found
        change = found[name][1] - found['dense'][1] if both else None
        lines.append(_verdict(f'{name}, CamVid test', -most, change, ''))
    return markdown(('target', 'asked for', 'measured', ''), lines)


def _verdict(
    what: str, least: float, value: float | None, unit: str
) -> list[str]:
    if value is None:
        return [what, f'{abs(least):g}{unit}', 'not measured', '']
    passed = 'reached' if value >= least else '**missed**'
    sign = -1 if least < 0 else 1
    return [what, f'{abs(least):g}{unit}', f'{sign * value:.2f}{unit}', passed]


def report(rows: Rows) -> str:
    """All tables, and what could not be measured."""
    failed = [
        f'- {row["key"]}: {row.get("error_text") or row["unreachable"]}'
        for row in rows
        if 'error_text' in row or 'unreachable' in row
    ]
    where = sorted({f'{row["device"]}, torch {row["torch"]}' for row in rows})
    parts = {
        '; '.join(where): '',
        'Targets': target_table(rows),
        'Correctness': check_table(rows),
        'Speed, bf16': speed_table(rows),
        'Accuracy': accuracy_tables(rows),
        'Not measured': '\n'.join(failed) + '\n',
    }
    return '\n'.join(f'## {head}\n\n{text}' for head, text in parts.items())


def plot(rows: Rows, path: Path) -> None:
    """Speed against mIoU, of the rows that have both."""
    figure = Figure(figsize=(6, 4), dpi=110)
    axis = figure.subplots()
    found = accuracies(rows)
    for mode, marker in (('eager', 'o'), ('compiled', 's')):
        group = speeds(rows).get((PICTURED, mode, False), {})
        for name in found.keys() & group.keys():
            x, y = group[name]['images_per_s'], found[name][1]
            colour = f'C{sorted(found).index(name) % 10}'
            axis.plot(x, y, marker, color=colour)
            axis.annotate(f'{name}, {mode}', (x, y), fontsize=7)
    axis.set_xlabel(f'images per second, {PICTURED}')
    axis.set_ylabel('test mIoU, CamVid')
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
