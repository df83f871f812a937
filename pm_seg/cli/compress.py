r"""Compress a dense checkpoint to a budget, without training.

Writes a checkpoint, ready for test.py or for fine-tuning. A few training
images say which tokens matter and how they best get fewer over depth, in about
a minute. Without that (--calib-batches 0) it takes seconds and needs no data.
A checkpoint that was compressed already is not measured again.

examples:
  # half of the operations of the encoder
  python tools/compress.py configs/segmenter_vit-t_pm_camvid.py dense.pth \
      --out pm.pth --keep 0.5
  # half of those of the whole model
  python tools/compress.py configs/segmenter_vit-t_pm_camvid.py dense.pth \
      --out pm.pth --target share=0.5
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from mmengine.runner import weights_to_cpu

from ..core.compressor import check_share
from ..engine.compression import (
    Measuring,
    calibration_loader,
    compress,
    needs_data,
)
from ..engine.evaluation import compare_macs, compare_speed, evaluate
from ..engine.scoring import require_compressible, uncompressed
from ..engine.targets import TARGETS, check_target
from ..utils import median, shown_progress
from ..utils.files import whole_files
from ..version import __version__
from ..visualization.inspection import dataset_meta, inspect, test_pipeline
from ..visualization.layers import describe
from ..visualization.report import CompressionReport, machine
from .arguments import add_config, add_device, make_parser, output_file
from .config import load_config, load_model
from .data import check_data
from .ending import command, wrong_usage


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('compress.py', __doc__)
    add_config(parser)
    add = parser.add_argument
    add('checkpoint', help='dense or compressed checkpoint')
    add('--out', type=output_file, required=True, help='checkpoint to write')
    title = 'how much to keep, else what the config says'
    budget = parser.add_argument_group(title).add_mutually_exclusive_group()
    add = budget.add_argument
    add(
        '--keep', type=float, help="share of the layers' operations, in (0, 1]"
    )
    add(
        '--target',
        metavar='KIND=VALUE',
        help='a budget of the whole model, with KIND one of '
        f'{", ".join(TARGETS)}: share=0.7 is 70 %% of the dense GMACs; '
        'latency_ms=20,batch_size=8,compiled=1 that of a compiled batch',
    )
    group = parser.add_argument_group(
        "measuring, on what the config's hook says, else 8 and 50 batches"
    )
    add = group.add_argument
    add('--calib-batches', type=int, metavar='N', help='0 for no measuring')
    add(
        '--score-batches', type=int, metavar='N', help="for type='paper' alone"
    )
    add('--speed', action='store_true', help='time an image, dense as well')
    add(
        '--evaluate',
        action='store_true',
        help='accuracy on the validation data, dense and compressed',
    )
    add_device(group)
    add = parser.add_argument_group('report').add_argument
    add(
        '--report',
        type=output_file,
        metavar='HTML',
        help='page to write about structure, costs, speed on the CPU, '
        'accuracy (with --evaluate) and pictures; a single file',
    )
    add(
        '--report-images',
        nargs='+',
        metavar='IMG',
        help='for the report; defaults to two of the validation data',
    )
    return parser.parse_args(argv)


def _budget(args: argparse.Namespace) -> dict[str, float] | None:
    """The target, if there is one; stops on a budget that cannot be."""
    try:
        if args.keep is not None:
            check_share('--keep', args.keep)
        if args.target is None:
            return None
        pairs = (part.partition('=') for part in args.target.split(','))
        target = {key: float(value) for key, _, value in pairs}
        check_target(target)
        return target
    except ValueError as error:
        given = f'--target {args.target}: ' if args.target else ''
        wrong_usage(f'{given}{error}')


def _measuring(cfg: Config, args: argparse.Namespace) -> Measuring:
    """What the config's hook says, and the command line instead."""
    hooks = cfg.get('custom_hooks') or []
    own = [hook for hook in hooks if hook['type'] == 'PruneMergeHook']
    options = {
        field.name: source[field.name]
        for source in (*own, vars(args))  # the last one counts
        for field in fields(Measuring)
        if source.get(field.name) is not None
    }
    try:
        return Measuring(**options)
    except ValueError as error:
        wrong_usage(str(error))


def _save(path: Path, model: BaseModel, meta: dict) -> None:
    """Write the checkpoint, or leave what was there as it is."""
    state = weights_to_cpu(model.state_dict())
    try:
        with whole_files(path) as (unfinished,):
            torch.save(dict(state_dict=state, meta=meta), unfinished)
    except (OSError, RuntimeError) as error:  # of the system, of torch
        raise SystemExit(
            f'Cannot write {path} to its end ({error}); what was there is '
            'unchanged. Make room or choose another place with --out'
        ) from None
    print(f'Wrote {path}')


def _accuracy(model: BaseModel, cfg: Config) -> dict[str, dict[str, float]]:
    """Metrics of the validation data, 'dense' and 'compressed'."""
    with shown_progress() as progress:
        with uncompressed(model):
            show = partial(progress, 'Evaluating, dense')
            metrics = dict(dense=evaluate(model, cfg, show))
        show = partial(progress, 'Evaluating, compressed')
        metrics['compressed'] = evaluate(model, cfg, show)
    for name, values in metrics.items():
        shown = '  '.join(f'{k}: {v:.2f}' for k, v in values.items())
        print(f'{name + ":":<12}{shown}')
    return metrics


def _samples(cfg: Config, images: list[str] | None) -> list[dict]:
    """The images of the report, prepared as in testing."""
    if images:
        pipeline = test_pipeline(cfg)
        return [pipeline(dict(img_path=path)) for path in images]
    try:
        check_data(cfg, 'val')
    except SystemExit as error:
        print(f'No pictures in the report: {error}', file=sys.stderr)
        return []
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    return [dataset[0], dataset[len(dataset) // 2]][: len(dataset)]


def _summary(
    macs: dict[str, int], seconds: dict[str, dict[str, list[float]]]
) -> str:
    """What it brings, in one line."""
    dense, left = macs['dense'] / 1e9, macs['compressed'] / 1e9
    text = f'{left:.2f} of {dense:.2f} GMACs ({left / dense:.0%})'
    for device, times in seconds.items():
        ratio = median(times['dense']) / median(times['compressed'])
        text += f', {ratio:.2f}x as fast on {device}'
    return f'The whole model, one image: {text}'


@command('What was announced as written is complete.')
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/compress.py``."""
    args = parse_args(argv)
    target = _budget(args)
    for path in args.report_images or ():
        if not Path(path).is_file():
            sys.exit(f'Image not found: {path}')
    cfg = load_config(args)
    measuring = _measuring(cfg, args)
    model, saved = load_model(cfg.model, args.checkpoint, args.device)
    require_compressible(model)
    loader = None
    if needs_data(model) or measuring.calib_batches:
        check_data(cfg, 'train')
        loader = calibration_loader(cfg)
    if args.evaluate:
        check_data(cfg, 'val')
    with shown_progress() as progress:
        compress(model, loader, args.keep, target, measuring, progress)
    print(describe(model))
    meta = dict(
        dataset_meta=saved.get('meta', {}).get('dataset_meta'),
        cfg=cfg.pretty_text,
        pm_seg_version=__version__,
    )
    _save(args.out, model, meta)
    accuracy = _accuracy(model, cfg) if args.evaluate else {}
    macs = compare_macs(model)
    seconds = {}
    if args.speed or args.report:
        if args.device != 'cpu':
            seconds[args.device] = compare_speed(model)
        seconds['CPU'] = compare_speed(model.cpu())
    print(_summary(macs, seconds))
    if not args.report:
        return
    typed = argv if argv is not None else sys.argv[1:]
    measured = f'{measuring.calib_batches} batches' if loader else 'nothing'
    facts = {
        'command': shlex.join(['python', 'tools/compress.py', *typed]),
        'compression': str(cfg.model.backbone.get('compression')),
        'measured on': measured,
        'machine': machine(),
        'date': datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
    }
    samples = _samples(cfg, args.report_images)
    CompressionReport(
        model,
        f'Compression of {Path(args.config).stem}',
        facts,
        macs,
        seconds,
        accuracy,
        [inspect(model, sample) for sample in samples],
        dataset_meta(cfg, saved),
    ).write(args.report)
    print(f'Wrote {args.report}')
