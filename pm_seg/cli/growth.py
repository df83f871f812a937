"""How time and memory grow with image size, depth and batch; leaks."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..core import ScoreRecorder, TokenCompressor
from ..models import PMSegmenterMaskTransformerHead, PMVisionTransformer
from ..version import __version__
from .common import command, make_parser, quiet_warnings

PATCH = 16
SIZES = (256, 512, 1024, 1536, 2048)
DEPTHS = (2, 4, 8)
BATCHES = (1, 4, 8)

#: The models: small, so that what grows is not hidden by what is fixed.
SHAPE = dict(patch_size=PATCH, embed_dims=32, num_heads=1)

#: The smallest size at which fixed costs no longer matter, for the fit.
FIT_FROM = 512


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'growth.py',
        'Measure on one CPU thread how time and memory of scoring, structure '
        'search, maps for a new grid and inference grow with image size, '
        'depth and batch, and fit an exponent to each. Linux only: every '
        'figure comes from a process of its own, whose peak memory the '
        'kernel tells.',
        ('all of it', '--out growth.json --plot growth.png'),
        ('whether memory stays', '--leak 2000 --plot leak.png'),
    )
    for what, values in (
        ('sizes', SIZES),
        ('depths', DEPTHS),
        ('batches', BATCHES),
    ):
        parser.add_argument(
            f'--{what}',
            type=int,
            nargs='+',
            default=values,
            metavar='N',
            help=f'defaults to {" ".join(map(str, values))}',
        )
    parser.add_argument(
        '--only',
        nargs='+',
        choices=list(QUANTITIES),
        default=None,
        metavar='QUANTITY',
        help=f'of {", ".join(QUANTITIES)}; all unless given',
    )
    parser.add_argument(
        '--leak',
        type=int,
        metavar='N',
        help='instead, run N images of mixed sizes through a compressed '
        'model and record the memory after each',
    )
    parser.add_argument('--out', help='JSON file to write')
    parser.add_argument('--plot', help='PNG file to draw')
    return parser.parse_args(argv)


# ------------------------------------------------------------- what to run


def _backbone(
    size: int, depth: int, compression: dict | None
) -> PMVisionTransformer:
    torch.manual_seed(0)
    model = PMVisionTransformer(
        img_size=size, num_layers=depth, compression=compression, **SHAPE
    )
    if compression is not None:
        compressor = model.compressor
        compressor.set_scores(*_measured(compressor))
    return model.eval()


def _measured(compressor: TokenCompressor) -> tuple[torch.Tensor, ...]:
    """Scores and losses of the right shape."""
    scores = torch.rand_like(compressor.scores) + 0.01
    return scores, torch.rand_like(compressor.losses).cumsum(1)


def _scoring(size: int, depth: int, batch: int) -> Callable[[], None]:
    model = _backbone(size, depth, None).requires_grad_(False)
    images = torch.randn(batch, 3, size, size)
    tokens = (size // PATCH) ** 2

    def call() -> None:
        with ScoreRecorder(model.score_taps, tokens, 1) as recorder:
            model(images)[0].square().mean().backward()
        recorder.scores()

    return call


def _structure(size: int, depth: int, batch: int) -> Callable[[], None]:
    side = size // PATCH
    compressor = TokenCompressor(depth, (side, side), 1, keep=0.5)
    scores, losses = _measured(compressor)
    return lambda: compressor.set_scores(scores, losses)


def _new_grid(size: int, depth: int, batch: int) -> Callable[[], None]:
    side = size // PATCH
    compressor = TokenCompressor(depth, (16, 16), 1, keep=0.5)
    compressor.set_scores(*_measured(compressor))
    # One patch more, so that 256 is another grid too.
    grid = (side, side + 1)

    def call() -> None:
        compressor._refresh()  # nothing is cached
        compressor.token_maps(grid)

    return call


def _inference(compression: dict | None) -> Callable:
    def make(size: int, depth: int, batch: int) -> Callable[[], None]:
        model = _backbone(size, depth, compression)
        images = torch.randn(batch, 3, size, size)

        def call() -> None:
            with torch.inference_mode():
                model(images)

        return call

    return make


OURS = dict(keep=0.5)
STATIC = dict(keep=0.5, adapt=0)
MATCHING = dict(keep=0.5, builder='matching')

#: Name: (function of size, depth and batch that makes a call, whether
#: attention is left out of it). A call's set-up is not measured.
QUANTITIES: dict[str, tuple[Callable, bool]] = {
    'scoring': (_scoring, False),
    'scoring, attention left out': (_scoring, True),
    'structure search': (_structure, False),
    'maps for a new grid': (_new_grid, False),
    'inference, dense': (_inference(None), False),
    'inference, compressed': (_inference(OURS), False),
    'inference, dense, attention left out': (_inference(None), True),
    'inference, compressed, attention left out': (_inference(OURS), True),
    'inference, static groups, attention left out': (_inference(STATIC), True),
    'inference, matching, attention left out': (_inference(MATCHING), True),
}
#: Structures have nothing to do with batches.
WITHOUT_BATCH = ('structure search', 'maps for a new grid')


@contextmanager
def _without_attention() -> Iterator[None]:
    """Attention returns the values; all that surrounds it still runs."""

    def values(q, k, v, **kwargs):
        return v + 0 * q + 0 * k

    with patch.object(F, 'scaled_dot_product_attention', values):
        yield


# ------------------------------------------------------------------ measure


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(field + ':'):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f'/proc/self/status has no {field}')


def _measure(name: str, size: int, depth: int, batch: int) -> dict:
    """CPU seconds of a call, the least of several, and peak MiB."""
    make, bare = QUANTITIES[name]
    call = make(size, depth, batch)
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
    before = _status('VmRSS')
    seconds: list[float] = []
    peak = 0
    with _without_attention() if bare else nullcontext():
        while len(seconds) < 2 or (sum(seconds) < 0.1 and len(seconds) < 50):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
            if len(seconds) == 1:
                peak = _status('VmHWM')
            if seconds[-1] > 1:
                break
    return dict(
        quantity=name,
        size=size,
        tokens=(size // PATCH) ** 2,
        depth=depth,
        batch=batch,
        seconds=min(seconds),
        mib=max(peak - before, 0) / 2**20,
    )


def _apart(function: Callable, *arguments) -> dict:
    """Call a function in a process of its own."""
    context = multiprocessing.get_context('fork')
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        send.send(function(*arguments))

    process = context.Process(target=run)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        raise RuntimeError(
            f'{arguments} ended with exit code {process.exitcode} before it '
            'was measured; was it out of memory?'
        ) from None
    finally:
        process.join()


def measure(
    sizes: list[int],
    depths: list[int],
    batches: list[int],
    only: list[str] | None = None,
) -> list[dict]:
    """Rows of all quantities: by size, by depth at 512, by batch at 256."""
    wanted = []
    for name in only or QUANTITIES:
        wanted += [(name, 'size', size, 2, 1) for size in sizes]
        wanted += [(name, 'depth', 512, depth, 1) for depth in depths]
        if name not in WITHOUT_BATCH:
            wanted += [(name, 'batch', 256, 2, batch) for batch in batches]
    rows = []
    for name, along, size, depth, batch in track(
        wanted, console=Console(stderr=True), auto_refresh=False
    ):
        row = _apart(_measure, name, size, depth, batch)
        rows.append(dict(row, along=along))
    return rows


def exponent(rows: list[dict], along: str, value: str) -> float:
    """Slope of a line through log(value) by log(tokens, depth or batch).

    Small sizes, where fixed costs dominate, are left out.
    """
    x = 'tokens' if along == 'size' else along
    points = [
        (row[x], row[value])
        for row in rows
        if row['along'] == along
        and row[value] > 0
        and (along != 'size' or row['size'] >= FIT_FROM)
    ]
    if len({x for x, _ in points}) < 2:
        return math.nan
    return float(np.polyfit(*np.log(points).T, 1)[0])


def exponents(rows: list[dict]) -> list[dict]:
    """For each quantity: how time and memory grow along each axis."""
    out = []
    for name in dict.fromkeys(row['quantity'] for row in rows):
        own = [row for row in rows if row['quantity'] == name]
        largest = max(own, key=lambda row: row['tokens'])
        out.append(
            dict(
                quantity=name,
                seconds=largest['seconds'],
                mib=largest['mib'],
                size=largest['size'],
                **{
                    f'{value}_by_{along}': exponent(own, along, value)
                    for along in ('size', 'depth', 'batch')
                    for value in ('seconds', 'mib')
                },
            )
        )
    return out


def _number(value: float) -> str:
    return '-' if math.isnan(value) else f'{value:.2f}'


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


# --------------------------------------------------------------------- leak


def leak_model() -> tuple[PMVisionTransformer, PMSegmenterMaskTransformerHead]:
    """A tiny compressed encoder and decoder."""
    torch.manual_seed(0)
    shape = dict(embed_dims=24, num_layers=2, num_heads=3)
    encoder = PMVisionTransformer(
        img_size=64, patch_size=PATCH, compression=dict(keep=0.5), **shape
    )
    decoder = PMSegmenterMaskTransformerHead(
        in_channels=24,
        channels=24,
        num_classes=5,
        dropout_ratio=0.0,
        compression=dict(grid=(4, 4), keep=0.5),
        **shape,
    )
    for part in (encoder, decoder):
        part.compressor.set_scores(*_measured(part.compressor))
    return encoder.eval(), decoder.eval()


def leak(images: int) -> dict:
    """Memory after each of many images of mixed sizes.

    Returns:
        dict: 'mib', resident memory after each image; 'layouts', derived
        structures that the encoder holds; 'grids', how many different ones
        the images had; 'growth', MiB per 1000 images over the second half.
    """
    encoder, decoder = leak_model()
    draw = random.Random(0)
    memory, layouts, grids = [], [], set()
    for _ in track(
        range(images), console=Console(stderr=True), auto_refresh=False
    ):
        size = [draw.randint(33, 192) for _ in range(2)]
        grids.add(tuple(-(-n // PATCH) for n in size))
        with torch.inference_mode():
            decoder(encoder(torch.rand(draw.randint(1, 3), 3, *size)))
        memory.append(_status('VmRSS') / 2**20)
        layouts.append(len(encoder.compressor._layouts))
    half = np.array(memory[images // 2 :])
    slope = np.polyfit(np.arange(len(half)), half, 1)[0] * 1000
    return dict(
        mib=memory, layouts=layouts, grids=len(grids), growth=float(slope)
    )


def plot_leak(result: dict, path: Path) -> None:
    """Resident memory and number of derived maps by image."""
    figure = Figure(figsize=(8, 3.6), dpi=100)
    axis = figure.subplots()
    axis.plot(result['mib'], color='C0', linewidth=1)
    axis.set_xlabel('images of mixed sizes')
    axis.set_ylabel('resident memory, MiB', color='C0')
    axis.set_ylim(0, max(result['mib']) * 1.1)
    axis.grid(alpha=0.25)
    other = axis.twinx()
    other.plot(result['layouts'], color='C1', linewidth=1)
    other.set_ylabel('derived structures held', color='C1')
    other.set_ylim(0, max(result['layouts']) * 2)
    figure.tight_layout()
    _save(figure, path)


@command()
def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Entry point of ``tools/growth.py``; returns what ``--out`` holds."""
    args = parse_args(argv)
    quiet_warnings()
    if not Path('/proc/self/clear_refs').exists():
        sys.exit('growth.py reads memory from /proc and needs Linux')
    torch.set_num_threads(1)
    console = Console(width=100)
    about = dict(
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        pm_seg=__version__,
    )
    if args.leak:
        found = leak(args.leak)
        limit = TokenCompressor.max_cached_layouts
        console.print(
            f'{args.leak} images on {found["grids"]} grids: '
            f'{found["mib"][0]:.0f} MiB after the first, '
            f'{found["mib"][args.leak // 2]:.0f} after half, '
            f'{found["mib"][-1]:.0f} after the last '
            f'({found["growth"]:+.2f} MiB per 1000 images in the second '
            f'half); {max(found["layouts"])} derived structures held, the '
            f'limit is {limit}'
        )
        draw, result = plot_leak, found
    else:
        rows = measure(args.sizes, args.depths, args.batches, args.only)
        console.print(exponent_table(exponents(rows)))
        draw, result = plot, rows
    if args.out:
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        body = dict(about=about, result=result)
        if not args.leak:
            body['exponents'] = exponents(result)
        path.write_text(json.dumps(body, indent=1) + '\n')
        console.print(f'Written to {path}')
    if args.plot:
        draw(result, Path(args.plot))
        console.print(f'Drawn in {args.plot}')
    return result
