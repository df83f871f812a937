"""How time and memory grow with image size, depth and batch; leaks.

Measure on one CPU thread how time and memory of scoring, of the paper's groups
and maps and of inference grow, and fit an exponent to each. Linux only: every
figure comes from a process of its own, whose peak memory the kernel tells.

examples:
  # all of it
  python tools/lab/growth.py --out growth.json --plot growth.png
  # whether memory stays
  python tools/lab/growth.py --leak 2000 --plot leak.png
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from growth_figures import exponent_table, plot, plot_leak
from growth_leak import leak, memory
from rich.console import Console
from rich.progress import track

from pm_seg.cli.arguments import make_parser
from pm_seg.cli.ending import command
from pm_seg.core import ImportanceFitter, ScoreRecorder
from pm_seg.models import PMVisionTransformer
from pm_seg.version import __version__

PATCH = 16
SIZES = (256, 512, 1024, 1536, 2048)
DEPTHS = (2, 4, 8)
BATCHES = (1, 4, 8)

#: The models: small, so that what grows is not hidden by what is fixed.
SHAPE = dict(patch_size=PATCH, embed_dims=32, num_heads=1)
OURS = dict(keep=0.7)
PAPER = dict(type='paper', keep_rate=0.7)

#: The smallest size at which fixed costs no longer matter, for the fit.
FIT_FROM = 512

Call = Callable[[], object]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('lab/growth.py', __doc__)
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
        help='instead, run N images of mixed sizes through compressed models '
        'and record the memory after each',
    )
    parser.add_argument('--out', help='JSON file to write')
    parser.add_argument('--plot', help='PNG file to draw')
    return parser.parse_args(argv)


# ------------------------------------------------------------- what to run


def backbone(
    size: int, depth: int, compression: dict | None
) -> PMVisionTransformer:
    """A small encoder; with scores at random if it needs some."""
    torch.manual_seed(0)
    model = PMVisionTransformer(
        img_size=size, num_layers=depth, compression=compression, **SHAPE
    )
    if compression is not None and model.compressor.needs_scores:
        model.compressor.set_scores(_scores(model))
    return model.eval()


def _scores(model: PMVisionTransformer) -> torch.Tensor:
    return torch.rand_like(model.compressor.scores) + 0.01


def _scoring(size: int, depth: int, batch: int) -> Call:
    model = backbone(size, depth, None).requires_grad_(False)
    images = torch.randn(batch, 3, size, size)
    tokens = (size // PATCH) ** 2

    def call() -> None:
        with ScoreRecorder(model.score_taps, tokens, 1) as recorder:
            model(images)[0].square().mean().backward()
        recorder.scores()

    return call


def _importance(size: int, depth: int, batch: int) -> Call:
    model = backbone(size, depth, None).requires_grad_(False)
    images = torch.randn(batch, 3, size, size)
    dims = SHAPE['embed_dims']

    def call() -> None:
        with ImportanceFitter(
            model.blocks, model.score_taps, 1, dims
        ) as fitter:
            model(images)[0].square().mean().backward()
        fitter.directions()

    return call


def _groups(size: int, depth: int, batch: int) -> Call:
    model = backbone(size, depth, PAPER)
    scores = _scores(model)
    return lambda: model.compressor.set_scores(scores)


def _new_grid(size: int, depth: int, batch: int) -> Call:
    compressor = backbone(256, depth, PAPER).compressor
    # One patch more, so that 256 is another grid too.
    grid = (size // PATCH, size // PATCH + 1)

    def call() -> None:
        compressor.token_maps(grid)

    return call


def _inference(compression: dict | None) -> Callable[..., Call]:
    def make(size: int, depth: int, batch: int) -> Call:
        model = backbone(size, depth, compression)
        images = torch.randn(batch, 3, size, size)

        def call() -> None:
            with torch.inference_mode():
                model(images)

        return call

    return make


#: Name: (function of size, depth and batch that makes a call, whether
#: attention is left out of it). A call's set-up is not measured.
QUANTITIES: dict[str, tuple[Callable[..., Call], bool]] = {
    'scoring': (_scoring, False),
    'scoring, attention left out': (_scoring, True),
    'importance, attention left out': (_importance, True),
    'groups from scores, paper': (_groups, False),
    'maps for a new grid, paper': (_new_grid, False),
    'inference, dense': (_inference(None), False),
    'inference, compressed': (_inference(OURS), False),
    'inference, dense, attention left out': (_inference(None), True),
    'inference, compressed, attention left out': (_inference(OURS), True),
    'inference, paper, attention left out': (_inference(PAPER), True),
}
WITHOUT_BATCH = ('groups from scores, paper', 'maps for a new grid, paper')


@contextmanager
def without_attention() -> Iterator[None]:
    """Attention returns the values; all that surrounds it still runs."""

    def values(q, k, v, **kwargs):
        return v + 0 * q + 0 * k

    with patch.object(F, 'scaled_dot_product_attention', values):
        yield


# ------------------------------------------------------------------ measure


def measure_one(name: str, size: int, depth: int, batch: int) -> dict:
    """CPU seconds of a call, the least of several, and peak MiB."""
    make, bare = QUANTITIES[name]
    call = make(size, depth, batch)
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
    before = memory('VmRSS')
    seconds: list[float] = []
    peak = 0
    with without_attention() if bare else nullcontext():
        while len(seconds) < 2 or (sum(seconds) < 0.1 and len(seconds) < 50):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
            if len(seconds) == 1:
                peak = memory('VmHWM')
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
    sizes: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[int],
    only: Sequence[str] | None = None,
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
        row = _apart(measure_one, name, size, depth, batch)
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
        found = {key: largest[key] for key in ('seconds', 'mib', 'size')}
        for along in ('size', 'depth', 'batch'):
            for value in ('seconds', 'mib'):
                found[f'{value}_by_{along}'] = exponent(own, along, value)
        out.append(dict(quantity=name, **found))
    return out


@command()
def main(argv: list[str] | None = None) -> list[dict] | dict:
    """Measure; returns what ``--out`` holds."""
    args = parse_args(argv)
    if not Path('/proc/self/clear_refs').exists():
        sys.exit('growth.py reads memory from /proc and needs Linux')
    torch.set_num_threads(1)
    console = Console(width=100)
    body = {
        'about': dict(
            torch=torch.__version__,
            python=platform.python_version(),
            machine=platform.machine(),
            pm_seg=__version__,
        )
    }
    if args.leak:
        draw, result = plot_leak, leak(args.leak)
        console.print(
            f'{args.leak} images on {result["grids"]} grids: '
            f'{result["mib"][0]:.0f} MiB after the first, '
            f'{result["mib"][args.leak // 2]:.0f} after half, '
            f'{result["mib"][-1]:.0f} after the last '
            f'({result["growth"]:+.2f} MiB per 1000 images in the second '
            'half)'
        )
    else:
        draw = plot
        result = measure(args.sizes, args.depths, args.batches, args.only)
        body['exponents'] = exponents(result)
        console.print(exponent_table(body['exponents']))
    if args.out:
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**body, 'result': result}, indent=1))
        console.print(f'Written to {path}')
    if args.plot:
        draw(result, Path(args.plot))
        console.print(f'Drawn in {args.plot}')
    return result


if __name__ == '__main__':
    main()
