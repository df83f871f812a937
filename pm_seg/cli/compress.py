"""Compress a dense checkpoint to a budget, without training."""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from contextlib import nullcontext
from dataclasses import fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, load_checkpoint

from ..core.compressor import check_share
from ..engine.compression import (
    Measuring,
    calibration_loader,
    compress,
    needs_data,
)
from ..engine.evaluation import compare_macs, compare_speed, evaluate
from ..engine.scoring import (
    require_compressible,
    uncompressed,
)
from ..engine.targets import TARGETS, check_target
from ..utils import median, shown_progress
from ..utils.files import whole_files
from ..version import __version__
from ..visualization.inspection import dataset_meta, inspect, test_pipeline
from ..visualization.layers import describe
from ..visualization.report import CompressionReport, machine
from .common import (
    add_common_arguments,
    check_data,
    check_output,
    command,
    fetch_checkpoint,
    load_config,
    make_parser,
    quiet_warnings,
    wrong_usage,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'compress.py',
        'Write a compressed checkpoint, ready for test.py or for '
        'fine-tuning. Nothing is trained; a few training images say which '
        'tokens matter and how they best get fewer over depth, in about a '
        'minute. Without that (--calib-batches 0) it takes seconds and needs '
        'no data. A checkpoint that was compressed already is not measured '
        'again.',
        (
            'half of the operations of the encoder',
            'configs/segmenter_vit-t_pm_camvid.py dense.pth --out pm.pth '
            '--keep 0.5',
        ),
        (
            'half of those of the whole model',
            'configs/segmenter_vit-t_pm_camvid.py dense.pth --out pm.pth '
            '--target share=0.5',
        ),
    )
    parser.add_argument('config', help='a config with compression')
    parser.add_argument('checkpoint', help='dense or compressed checkpoint')
    parser.add_argument('--out', required=True, help='checkpoint to write')
    group = parser.add_argument_group('how much to keep')
    budget = group.add_mutually_exclusive_group()
    budget.add_argument(
        '--keep',
        type=float,
        help="share of the operations of the encoder's layers, in (0, 1]; "
        "defaults to the config's",
    )
    budget.add_argument(
        '--target',
        metavar='KIND=VALUE',
        help='a budget of the whole model instead, with KIND one of '
        f'{", ".join(TARGETS)}: share=0.7 is 70 %% of the dense GMACs; '
        'latency_ms=20,batch_size=8,compiled=1 that of a compiled batch',
    )
    group = parser.add_argument_group('measuring')
    group.add_argument(
        '--calib-batches',
        type=int,
        metavar='N',
        help='training batches to measure on, 0 for none; defaults to the '
        "config's hook, else 8",
    )
    group.add_argument(
        '--score-batches',
        type=int,
        metavar='N',
        help="training batches to score, for type='paper'; defaults to the "
        "config's hook, else 50",
    )
    group.add_argument(
        '--speed',
        action='store_true',
        help='measure the time of one image, dense and compressed in turns',
    )
    group.add_argument(
        '--evaluate',
        action='store_true',
        help='measure the accuracy on the validation data, dense and '
        'compressed',
    )
    group.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='defaults to cuda if there is one',
    )
    group = parser.add_argument_group('report')
    group.add_argument(
        '--report',
        metavar='HTML',
        help='page to write about structure, costs, speed on the CPU, '
        'accuracy (with --evaluate) and pictures; a single file',
    )
    group.add_argument(
        '--report-images',
        nargs='+',
        metavar='IMG',
        help='images for the report; defaults to two of the validation data',
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def _measuring(cfg: Config, args: argparse.Namespace) -> Measuring:
    """What the config's hook says, and the command line instead."""
    hook = {}
    for candidate in cfg.get('custom_hooks') or []:
        if candidate['type'] == 'PruneMergeHook':
            hook = candidate
    options = {
        field.name: hook[field.name]
        for field in fields(Measuring)
        if field.name in hook
    }
    for name in ('calib_batches', 'score_batches'):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    try:
        return Measuring(**options)
    except ValueError as error:
        wrong_usage(str(error))


def _target(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    try:
        pairs = (part.partition('=') for part in text.split(','))
        target = {key: float(value) for key, _, value in pairs}
        check_target(target)
        return target
    except ValueError as error:
        wrong_usage(f'--target {text}: {error}')


def _options(node: object, path: str = '') -> dict[str, str]:
    """Every compression dict of a model config, as text, by its place."""
    found = {}
    if isinstance(node, dict):
        for key, value in node.items():
            if key == 'compression' and value is not None:
                text = ', '.join(f'{k}={v!r}' for k, v in value.items())
                found[f'{path}.compression'] = f'dict({text})'
            else:
                found |= _options(value, f'{path}.{key}'.lstrip('.'))
    return found


def _accuracy(model: BaseModel, cfg: Config) -> dict[str, dict[str, float]]:
    """Metrics of the validation data, 'dense' and 'compressed'."""
    metrics = {}
    with shown_progress() as progress:
        for name, setting in (
            ('dense', uncompressed(model)),
            ('compressed', nullcontext()),
        ):
            title = f'Evaluating, {name}'
            with setting:
                metrics[name] = evaluate(model, cfg, partial(progress, title))
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
    loader = copy.deepcopy(cfg.val_dataloader)
    loader.update(num_workers=0, persistent_workers=False)
    dataset = Runner.build_dataloader(loader).dataset
    return [dataset[0], dataset[len(dataset) // 2]][: len(dataset)]


def _seconds(model: BaseModel, device: str) -> dict:
    """Times of one image, on the CPU and the device if it is another."""
    seconds = {}
    if device != 'cpu':
        seconds[device] = compare_speed(model)
    seconds['CPU'] = compare_speed(model.cpu())
    return seconds


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
    quiet_warnings()
    cfg = load_config(args)
    target = _target(args.target)
    check_output(args.out)
    if args.report:
        check_output(args.report)
    checkpoint = fetch_checkpoint(args.checkpoint)
    for path in args.report_images or ():
        if not Path(path).is_file():
            sys.exit(f'Image not found: {path}')
    if args.keep is not None:
        try:
            check_share('--keep', args.keep)
        except ValueError as error:
            wrong_usage(str(error))
    measuring = _measuring(cfg, args)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    model = MODELS.build(cfg.model)
    require_compressible(model)
    saved = load_checkpoint(model, checkpoint, map_location='cpu')
    model.to(args.device)
    loader = None
    if needs_data(model) or measuring.calib_batches:
        check_data(cfg, 'train')
        loader = calibration_loader(cfg)
    if args.evaluate:
        check_data(cfg, 'val')
    with shown_progress() as progress:
        compress(model, loader, args.keep, target, measuring, progress)
    print(describe(model))
    meta = {
        **{k: saved.get('meta', {}).get(k) for k in ('dataset_meta',)},
        'cfg': cfg.pretty_text,
        'pm_seg_version': __version__,
    }
    content = {'state_dict': model.cpu().state_dict(), 'meta': meta}
    try:
        with whole_files(Path(args.out)) as (partial_file,):
            torch.save(content, partial_file)
    except (OSError, RuntimeError) as error:  # of the system, of torch
        raise SystemExit(
            f'Cannot write {args.out} to its end ({error}); what was there is '
            'unchanged. '
            'Make room or choose another place with --out'
        ) from None
    print(f'Wrote {args.out}')
    model.to(args.device)
    accuracy = _accuracy(model, cfg) if args.evaluate else {}
    macs = compare_macs(model)
    seconds = {}
    if args.speed or args.report:
        seconds = _seconds(model, args.device)
    print(_summary(macs, seconds))
    if args.report:
        typed = argv if argv is not None else sys.argv[1:]
        facts = {
            'config': args.config,
            'checkpoint': checkpoint,
            'compressed checkpoint': args.out,
            **_options(cfg.model.to_dict()),
            'command': shlex.join(['python', 'tools/compress.py', *typed]),
            'machine': machine(),
            'date': datetime.now(timezone.utc).strftime('%Y-%m-%d %H:%M UTC'),
        }
        if target is not None:
            facts['target'] = args.target
        if loader is not None:
            facts['measured on'] = f'{measuring.calib_batches} batches'
        samples = _samples(cfg, args.report_images)
        inspections = [inspect(model, sample) for sample in samples]
        CompressionReport(
            model,
            f'Compression of {Path(args.config).stem}',
            facts,
            macs,
            seconds,
            accuracy,
            inspections,
            dataset_meta(cfg, saved),
        ).write(args.report)
        print(f'Wrote {args.report}')


if __name__ == '__main__':
    main()
