r"""The whole story in minutes: compress, fine-tune, measure, draw.

Draw a small dataset, train a Segmenter on it to have one, compress it without
training, fine-tune it briefly, and compare all three in accuracy and speed.
Shows the commands that do the same. Less than 5 minutes on two CPU cores.

examples:
  # the whole story
  python tools/demo.py
  # only see that everything runs
  python tools/demo.py --quick
  # the same story with a model of your own, which is there already
  python tools/demo.py --config my_segmenter.py \
      --checkpoint my_segmenter.pth --data data/ade
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from functools import partial
from pathlib import Path

import make_scenes
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import find_latest_checkpoint
from mmseg.models import EncoderDecoder
from mmseg.registry import DATASETS
from rich.console import Console
from rich.table import Table

from pm_seg.cli import compress, test, train
from pm_seg.cli.arguments import make_parser
from pm_seg.cli.config import load_model, resolve_config
from pm_seg.cli.ending import command, wrong_usage
from pm_seg.utils import count_macs, median, time_interleaved
from pm_seg.visualization.figures import panel_figure, save_figure
from pm_seg.visualization.inspection import dataset_meta, inspect

console = Console(width=80, highlight=False)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('demo.py', __doc__)
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        default='work_dirs/demo',
        help='folder for data, checkpoints and pictures (default '
        'work_dirs/demo)',
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='a few images and iterations, to see that everything runs',
    )
    group = parser.add_argument_group('your own model instead')
    group.add_argument(
        '--config',
        help="a dense model's config of mmseg, with VisionTransformer",
    )
    group.add_argument('--checkpoint', help='its checkpoint')
    group.add_argument('--data', metavar='DIR', help='its data_root')
    args = parser.parse_args(argv)
    if (args.config is None) != (args.checkpoint is None):
        wrong_usage('--config and --checkpoint go together')
    return args


def compressed_config(dense: str) -> Config:
    """The config that compresses and fine-tunes a dense model of mmseg.

    Half of the layers' operations, 40 iterations against the dense model on
    2 images each, at a tenth of its learning rate.

    Raises:
        SystemExit: If its backbone is none that compression knows.
    """
    cfg = Config.fromfile(resolve_config(dense))
    model, backbone = cfg.model, cfg.model.backbone
    if backbone.type in ('VisionTransformer', 'mmseg.VisionTransformer'):
        backbone.type = 'PMVisionTransformer'
    if not backbone.type.startswith('PM') or 'decode_head' not in model:
        raise SystemExit(
            f'Error: the config has a backbone of type {backbone.type!r}, '
            "expected mmseg's VisionTransformer or one of pm_seg's, in a "
            'segmentor; see docs/models.md'
        )
    backbone.compression = dict(keep=0.5)
    model.type = 'DistilledEncoderDecoder'
    model.teacher = dict(alpha=0.5, tau=20.0)
    heads = model.decode_head
    for head in heads if isinstance(heads, list) else [heads]:
        if head.type == 'SegmenterMaskTransformerHead':
            head.type = 'PMSegmenterMaskTransformerHead'
    cfg.custom_imports = dict(imports=['pm_seg'])
    cfg.custom_hooks = [dict(type='PruneMergeHook')]
    cfg.optim_wrapper.optimizer.lr *= 0.1
    cfg.param_scheduler = []
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=40, val_interval=1000
    )
    cfg.default_hooks.checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=40
    )
    cfg.train_dataloader.batch_size = 2
    return cfg


def _run(tool, *arguments: str | Path):
    """Run a tool in this process, showing the command that does the same."""
    name, words = tool.__name__.rpartition('.')[2], list(map(str, arguments))
    console.print(
        f'\n[bold]$ python tools/{name}.py {shlex.join(words)}[/bold]',
        soft_wrap=True,
    )
    return tool.main(words)


def _load(config: str, checkpoint: str | Path) -> EncoderDecoder:
    """Any checkpoint, with the names and colours of its dataset."""
    cfg = Config.fromfile(resolve_config(config))
    if 'teacher' in cfg.model:
        cfg.model.teacher = None
    init_default_scope('mmseg')
    model, saved = load_model(cfg.model, str(checkpoint))
    model.cfg, model.dataset_meta = cfg, dataset_meta(cfg, saved)
    return model.eval()


def _measure(
    models: dict[str, EncoderDecoder], size: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """GMACs and CPU time of one image in each model, timed in turns."""
    images = torch.randn(1, 3, *size)
    calls = {name: partial(model, images) for name, model in models.items()}
    with torch.no_grad():
        seconds = time_interleaved(calls)
    return {
        name: dict(gmacs=count_macs(f) / 1e9, ms=median(seconds[name]) * 1e3)
        for name, f in calls.items()
    }


def _draw(
    path: Path,
    root: Path | str | None,
    dense: EncoderDecoder,
    small: EncoderDecoder,
) -> None:
    """Groups of the last layer and predictions of four annotated images."""
    cfg = dict(small.cfg.val_dataloader.dataset)
    if root is not None:
        cfg['data_root'] = str(root)
    dataset = DATASETS.build(cfg)
    panels, count = [], min(4, len(dataset))
    for index in range(count):
        one = inspect(small, dataset[index], dense)
        panels += one.prediction_panels(dense.dataset_meta)
        panels.append(one.group_panels()[-1])
    save_figure(panel_figure(panels, len(panels) // count), path)


def _table(results: dict[str, dict[str, float]]) -> Table:
    table = Table(title='Dense against compressed (CPU, fp32, one image)')
    for column in ('model', 'mIoU', 'GMACs', 'ms/image', 'images/s', 'speed'):
        table.add_column(column)
    base = results['dense']['ms']
    for name, row in results.items():
        table.add_row(
            name,
            f'{row["miou"]:.2f}',
            f'{row["gmacs"]:.2f}',
            f'{row["ms"]:.1f}',
            f'{1e3 / row["ms"]:.1f}',
            f'{base / row["ms"]:.2f}x',
        )
    return table


@command()
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/demo.py``."""
    args = parse_args(argv)
    start = time.monotonic()
    work = Path(args.work_dir)
    dense_dir, small_dir = work / 'dense', work / 'compressed'
    data = args.data or (None if args.config else work / 'data')
    # Tested below, not while training.
    options = ['--cfg-options', 'log_level=ERROR']
    options.append('train_cfg.val_begin=100000')
    options += [f'data_root={data}'] if data else []
    scenes = ['--num-train', '160', '--num-val', '24']
    if args.quick:
        scenes = ['--num-train', '16', '--num-val', '4']
        options += ['train_cfg.max_iters=2']

    if args.config:
        console.rule('1. Your dense model')
        dense_cfg, dense = args.config, args.checkpoint
        small_cfg = str(work / 'compressed.py')
        work.mkdir(parents=True, exist_ok=True)
        compressed_config(dense_cfg).dump(small_cfg)
        console.print(f'Its config with compression: {small_cfg}')
    else:
        console.rule('1. Data, and a dense Segmenter to start from')
        dense_cfg = 'configs/demo/segmenter_scenes.py'
        small_cfg = 'configs/demo/segmenter_pm_scenes.py'
        _run(make_scenes, data, *scenes)
        _run(train, dense_cfg, '--work-dir', dense_dir, *options)
        dense = find_latest_checkpoint(dense_dir)
    miou = {'dense': _run(test, dense_cfg, dense, *options)}

    console.rule('2. Compress it to half of its operations, without training')
    start_pth, report = work / 'compressed.pth', work / 'report.html'
    files = ('--out', start_pth, '--report', report)
    _run(compress, small_cfg, dense, *files, *options)
    miou['compressed'] = _run(test, small_cfg, start_pth, *options)

    console.rule('3. Fine-tune the compressed model')
    begin = (*options, f'load_from={start_pth}')
    _run(train, small_cfg, '--work-dir', small_dir, *begin)
    small = find_latest_checkpoint(small_dir)
    tuned = 'compressed, fine-tuned'
    miou[tuned] = _run(test, small_cfg, small, *options)

    console.rule('4. Compare')
    models = {
        'dense': _load(dense_cfg, dense),
        'compressed': _load(small_cfg, start_pth),
        tuned: _load(small_cfg, small),
    }
    results = _measure(models, models['dense'].backbone.img_size)
    for name, metrics in miou.items():
        results[name]['miou'] = float(metrics['mIoU'])
    picture, numbers = work / 'demo.png', work / 'demo.json'
    _draw(picture, data, models['dense'], models[tuned])
    numbers.write_text(json.dumps(results, indent=2) + '\n')
    console.print(_table(results))
    console.print(
        f'Pictures: {picture}\nReport:   {report}\nNumbers:  {numbers}\n'
        f'Took {time.monotonic() - start:.0f} s.'
    )
    if not args.config:
        console.print(
            'A model this small, trained this briefly, shows how things work. '
            'See the README for results, and --help for the same with a model '
            'of your own.'
        )


if __name__ == '__main__':
    main()
