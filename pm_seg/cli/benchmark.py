r"""Speed, memory and operations of dense and compressed models.

Time the model of a config, dense and compressed by several methods whose
layers cost the same, whole model, in one process and in turns. Dense is the
same class with compression off, on fused attention. Finding groups, merging
and restoring are part of every figure.

examples:
  # on this machine, random weights
  python tools/benchmark.py configs/segmenter_vit-s_pm_ade20k.py
  # a GPU, two batch sizes, eager and compiled
  python tools/benchmark.py configs/segmenter_vit-s_pm_ade20k.py pm.pth \
      --batch-size 1 32 --dtype bf16 --modes eager compiled --out speed.json
  # ours against dense in onnxruntime, on larger images
  python tools/benchmark.py configs/segmenter_vit-s_pm_ade20k.py pm.pth \
      --methods ours --modes onnx --size 768 1024
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..utils import count_macs
from ..utils.checkpoints import load_from_local
from ..version import __version__
from .arguments import (
    add_config,
    add_device,
    add_size,
    make_parser,
    output_file,
)
from .bench_measure import DTYPES, MODES, device_name, measure
from .bench_models import DENSE, METHODS, build_models, image_size
from .checkpoint import fetch_checkpoint
from .config import load_config
from .ending import command, wrong_usage
from .export_onnx import check_exporter

console = Console(width=80, highlight=False)

_COLUMNS = {
    'layers': '{share:.0%}',
    'GMACs': '{gmacs:.2f}',
    'ms': '{latency_ms:.1f}',
    '+-': '{spread_ms:.1f}',
    'img/s': '{images_per_s:.1f}',
    'speed': '{speedup:.2f}x',
    'of ideal': '{of_ideal:.0%}',
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('benchmark.py', __doc__)
    add_config(parser)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='dense or compressed; without one all weights are random',
    )
    add = parser.add_argument_group('what is compared').add_argument
    add(
        '--keep',
        type=float,
        help="share of the MACs of the encoder's layers; defaults to the "
        "checkpoint's if it is compressed, else to the config's",
    )
    add(
        '--methods',
        nargs='+',
        choices=list(METHODS),
        default=list(METHODS),
        metavar='METHOD',
        help=f'of {", ".join(METHODS)} (default all)',
    )
    group = parser.add_argument_group('settings; each combination is a table')
    add = group.add_argument
    add(
        '--modes',
        nargs='+',
        choices=MODES,
        default=['eager'],
        metavar='MODE',
        help=f'of {", ".join(MODES)} (default eager); cudagraph needs CUDA, '
        'onnx is onnxruntime on the CPU in fp32, whatever the device',
    )
    add(
        '--dtype',
        nargs='+',
        choices=list(DTYPES),
        default=['fp32'],
        metavar='DTYPE',
        help=f'of {", ".join(DTYPES)} (default fp32)',
    )
    add(
        '--no-tf32',
        action='store_true',
        help='fp32 on CUDA without TF32, which makes dense products slow and '
        'every compression look good',
    )
    add(
        '--batch-size',
        type=int,
        nargs='+',
        default=[1],
        metavar='N',
        help='images at a time (default 1)',
    )
    add_size(group)
    add('--train', action='store_true', help='time training steps instead')
    group = parser.add_argument_group('measuring')
    add = group.add_argument
    add('--rounds', type=int, default=15, help='timed turns (default 15)')
    add_device(group)
    add('--out', type=output_file, metavar='FILE', help='JSON file to write')
    return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    """Stop on what cannot be meant."""
    cuda = torch.device(args.device).type == 'cuda'
    if 'cudagraph' in args.modes and not cuda:
        wrong_usage('--modes cudagraph needs a CUDA device')
    if 'onnx' in args.modes:
        if args.train:
            wrong_usage('--modes onnx times inference; leave --train out')
        check_exporter()
    if args.rounds < 2:
        wrong_usage(f'--rounds must be 2 or more, got {args.rounds}')
    if args.size and min(args.size) < 1:
        wrong_usage(f'--size must be 1 or more, got {args.size}')


def _costs(model: nn.Module, probe: Tensor) -> dict:
    """Share of the layers, GMACs of the whole model and its parameters."""
    model.eval()
    compressor = model.backbone.compressor
    return dict(
        share=1.0 if compressor is None else compressor.share,
        gmacs=count_macs(lambda: model(probe, mode='tensor')) / 1e9,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def table(rows: Sequence[dict]) -> Table:
    """Rows of one setting as a table that fits 80 columns.

    'layers' and 'GMACs' are the cost of the layers, as a share of the dense
    ones', and of the model; 'of ideal' is the share of the promised speed.
    """
    first = rows[0]
    what = 'training step' if first['train'] else 'inference'
    place = ' on the CPU' if first['mode'] == 'onnx' else ''
    out = Table(
        '',
        title=f'{what}, {first["mode"]}{place}, {first["precision"]}, batch '
        f'{first["batch_size"]} of {"x".join(map(str, first["size"]))}',
    )
    columns = dict(_COLUMNS)
    if first['peak_gib'] is not None:
        columns['GiB'] = '{peak_gib:.2f}'
    for head in columns:
        out.add_column(head, justify='right')
    for row in rows:
        cells = (cell.format_map(row) for cell in columns.values())
        out.add_row(row['method'], *cells)
    return out


def write_rows(path: Path | None, results: list[dict]) -> None:
    """Write rows as JSON, if there is a path; creates its folder."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + '\n')


@command()
def main(argv: list[str] | None = None) -> list[dict]:
    """Entry point of ``tools/benchmark.py``; returns all rows."""
    args = parse_args(argv)
    _check(args)
    cfg = load_config(args)
    device = torch.device(args.device)
    tf32 = device.type == 'cuda' and not args.no_tf32
    if device.type == 'cuda' and device.index is not None:
        torch.cuda.set_device(device)
    if tf32:
        torch.set_float32_matmul_precision('high')
    about = dict(
        torch=torch.__version__,
        python=platform.python_version(),
        pm_seg=__version__,
        config=Path(args.config).name,
    )
    console.print(
        f'{about["config"]} on {device_name(device)}, torch '
        f'{about["torch"]}, pm_seg {about["pm_seg"]}'
    )
    size = tuple(args.size or image_size(cfg))
    state = None
    if args.checkpoint:
        saved = load_from_local(fetch_checkpoint(args.checkpoint), 'cpu')
        state = saved.get('state_dict', saved)
    models, missing = build_models(cfg, size, args.methods, args.keep, state)
    for name, why in missing.items():
        console.print(f'{name} is left out: {why}')
    probe, results = torch.zeros(1, 3, *size), []
    costs = {name: _costs(model, probe) for name, model in models.items()}
    for dtype, batch, mode in product(args.dtype, args.batch_size, args.modes):
        if mode == 'onnx' and dtype != args.dtype[0]:
            continue  # of one precision alone
        images = torch.randn(batch, 3, *size)
        rows = measure(
            models, images, dtype, mode, args.train, args.rounds, device
        )
        for row in rows:
            row.update(costs[row['method']], **about)
            full = row['dtype'] == 'fp32' and tf32 and mode != 'onnx'
            row['precision'] = 'fp32 (TF32)' if full else row['dtype']
            ideal = costs[DENSE]['gmacs'] / row['gmacs']
            row['of_ideal'] = row['speedup'] / ideal
        results += rows
        console.print(table(rows))
        write_rows(args.out, results)
        torch._dynamo.reset()
    return results
