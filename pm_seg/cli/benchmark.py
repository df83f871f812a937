"""Speed, memory and operations of dense and compressed models."""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import cv2
import torch
from mmengine.registry import init_default_scope
from mmengine.utils import to_2tuple
from rich.console import Console
from torch import Tensor, nn

from ..utils import count_macs, keep_freed_memory
from ..utils.checkpoints import read_checkpoint
from ..version import __version__
from .bench_measure import DTYPES, MODES, device_name, measure
from .bench_models import DENSE, METHODS, build_models, image_size
from .bench_report import plot, table
from .common import (
    add_common_arguments,
    check_output,
    command,
    fetch_checkpoint,
    load_config,
    make_parser,
    quiet_warnings,
    wrong_usage,
)
from .export_onnx import check_exporter

console = Console(width=80, highlight=False)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'benchmark.py',
        'Time the model of a config, dense and compressed by several methods '
        'whose layers cost the same, whole model, in one process and in '
        'turns. Dense is the same class with compression off, on fused '
        'attention. Finding groups, merging and restoring are part of every '
        'figure.',
        (
            'on this machine, random weights',
            'configs/segmenter_vit-s_pm_ade20k.py',
        ),
        (
            'a GPU, two batch sizes, eager and compiled, with a picture',
            'configs/segmenter_vit-s_pm_ade20k.py pm.pth --batch-size 1 32 '
            '--dtype bf16 --modes eager compiled --out speed.json --plot '
            'speed.png',
        ),
        (
            'ours against dense in onnxruntime, on larger images',
            'configs/segmenter_vit-s_pm_ade20k.py pm.pth --methods ours '
            '--modes onnx --size 768 1024',
        ),
    )
    parser.add_argument('config', help='a config with compression')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='dense or compressed; without one all weights are random',
    )
    group = parser.add_argument_group('what is compared')
    group.add_argument(
        '--keep',
        type=float,
        help="share of the MACs of the encoder's layers; defaults to the "
        "checkpoint's if it is compressed, else to the config's",
    )
    group.add_argument(
        '--methods',
        nargs='+',
        choices=list(METHODS),
        default=list(METHODS),
        metavar='METHOD',
        help=f'of {", ".join(METHODS)} (default all)',
    )
    group = parser.add_argument_group('settings; each combination is a table')
    group.add_argument(
        '--modes',
        nargs='+',
        choices=MODES,
        default=['eager'],
        metavar='MODE',
        help=f'of {", ".join(MODES)} (default eager); cudagraph needs CUDA, '
        'onnx is onnxruntime on the CPU in fp32, whatever the device',
    )
    group.add_argument(
        '--dtype',
        nargs='+',
        choices=list(DTYPES),
        default=['fp32'],
        metavar='DTYPE',
        help=f'of {", ".join(DTYPES)} (default fp32)',
    )
    group.add_argument(
        '--no-tf32',
        action='store_true',
        help='fp32 on CUDA without TF32, which makes dense products slow and '
        'every compression look good',
    )
    group.add_argument(
        '--batch-size',
        type=int,
        nargs='+',
        default=[1],
        metavar='N',
        help='images at a time (default 1)',
    )
    group.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="image size, any; defaults to the config's",
    )
    group.add_argument(
        '--train',
        action='store_true',
        help='time forward and backward of a training step instead',
    )
    group = parser.add_argument_group('measuring')
    group.add_argument(
        '--rounds',
        type=int,
        default=15,
        metavar='N',
        help='how often each is timed, in turns (default 15)',
    )
    group.add_argument(
        '--images',
        metavar='DIR',
        help='folder of images to use instead of random ones',
    )
    group.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='defaults to cuda if there is one',
    )
    group = parser.add_argument_group('output')
    group.add_argument('--out', metavar='FILE', help='JSON file to write')
    group.add_argument(
        '--plot', metavar='FILE', help='PNG file to draw: speed by GMACs'
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def _images(folder: str | None, batch: int, size: tuple[int, int]) -> Tensor:
    if folder is None:
        return torch.randn(batch, 3, *size)
    paths = sorted(Path(folder).glob('*'))
    read = (cv2.imread(str(path)) for path in paths)
    files = [image for image in read if image is not None][:batch]
    if not files:
        raise SystemExit(f'--images {folder}: no images in this folder')
    files = [cv2.resize(image, size[::-1]) for image in files]
    images = torch.stack([torch.from_numpy(i) for i in files]).flip(-1)
    images = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]


def _check(args: argparse.Namespace) -> None:
    """Stop on what cannot be meant."""
    cuda = torch.device(args.device).type == 'cuda'
    if 'cudagraph' in args.modes and not cuda:
        wrong_usage('--modes cudagraph needs a CUDA device')
    if 'onnx' in args.modes:
        if args.train:
            wrong_usage('--modes onnx times inference; leave --train out')
        check_exporter()
    for name in ('rounds', *(['size'] if args.size else [])):
        if min(to_2tuple(getattr(args, name))) < (
            2 if name == 'rounds' else 1
        ):
            wrong_usage(f'--{name} must be larger, got {getattr(args, name)}')
    for path in (args.out, args.plot):
        if path:
            check_output(path)


def _state(checkpoint: str | None) -> dict[str, Tensor] | None:
    if checkpoint is None:
        return None
    saved = read_checkpoint(fetch_checkpoint(checkpoint))
    return saved.get('state_dict', saved)


def _precision(dtype: str, mode: str, args: argparse.Namespace) -> str:
    """The type of the numbers as tables show it."""
    if mode == 'onnx':
        return 'fp32'
    cuda = torch.device(args.device).type == 'cuda'
    tf32 = dtype == 'fp32' and cuda and not args.no_tf32
    return 'fp32 (TF32)' if tf32 else dtype


def _costs(
    models: Mapping[str, nn.Module], size: tuple[int, int]
) -> dict[str, dict]:
    """Share of the layers, GMACs of the whole model and its parameters."""
    probe, costs = torch.zeros(1, 3, *size), {}
    for name, model in models.items():
        model.eval()
        compressor = model.backbone.compressor
        costs[name] = dict(
            share=1.0 if compressor is None else compressor.share,
            gmacs=count_macs(lambda m=model: m(probe, mode='tensor')) / 1e9,
            parameters=sum(p.numel() for p in model.parameters()),
        )
    return costs


def write_rows(path: str | None, results: list[dict]) -> None:
    """Write rows as JSON, if there is a path; creates its folder."""
    if path:
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + '\n')


@command()
def main(argv: list[str] | None = None) -> list[dict]:
    """Entry point of ``tools/benchmark.py``; returns all rows."""
    args = parse_args(argv)
    quiet_warnings()
    _check(args)
    cfg = load_config(args)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    device = torch.device(args.device)
    if device.type == 'cuda':
        if device.index is not None:
            torch.cuda.set_device(device)
        if not args.no_tf32:
            torch.set_float32_matmul_precision('high')
    else:
        keep_freed_memory()
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
    size = tuple(to_2tuple(args.size or image_size(cfg)))
    models, missing = build_models(
        cfg, size, args.methods, args.keep, _state(args.checkpoint)
    )
    for name, why in missing.items():
        console.print(f'{name} is left out: {why}')
    costs = _costs(models, size)
    results: list[dict] = []
    for dtype in args.dtype:
        for batch in args.batch_size:
            images = _images(args.images, batch, size)
            for mode in args.modes:
                if mode == 'onnx' and dtype != args.dtype[0]:
                    continue  # of one precision alone
                rows = measure(
                    models, images, dtype, mode, args.train, args.rounds,
                    device,
                )  # fmt: skip
                for row in rows:
                    row.update(costs[row['method']], **about)
                    row['precision'] = _precision(dtype, mode, args)
                    ideal = costs[DENSE]['gmacs'] / row['gmacs']
                    row['of_ideal'] = row['speedup'] / ideal
                results += rows
                console.print(table(rows))
                write_rows(args.out, results)
                gc.collect()
                torch._dynamo.reset()
    if args.plot:
        plot(results, Path(args.plot))
        console.print(f'Plot: {args.plot}')
    return results


if __name__ == '__main__':
    main()
