"""The whole story in minutes: compress, fine-tune, measure, draw."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from functools import partial
from pathlib import Path

import torch
from mmseg.apis import init_model
from mmseg.models import EncoderDecoder
from mmseg.registry import DATASETS
from rich.console import Console
from rich.table import Table

from ..utils import count_macs, median, time_interleaved
from ..visualization import panel_figure, save_figure
from ..visualization.inspection import inspect
from . import compress, make_scenes, test, train
from .common import command, make_parser, quiet_warnings, resolve_config

console = Console(width=80, highlight=False)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'demo.py',
        'Draw a small dataset, train a Segmenter on it to have one, compress '
        'it without training, fine-tune it briefly, and compare all three in '
        'accuracy and speed. Shows the commands that do the same. Less than 5 '
        'minutes on two CPU cores.',
        ('the whole story', ''),
        ('only see that everything runs', '--quick'),
    )
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
    return parser.parse_args(argv)


def _run(tool, *arguments: str):
    """Run a tool in this process, showing the command that does the same."""
    name = tool.__name__.rsplit('.', 1)[-1]
    console.print(
        f'\n[bold]$ python tools/{name}.py {shlex.join(arguments)}[/bold]',
        soft_wrap=True,
    )
    return tool.main(list(arguments))


def _last(work_dir: Path) -> Path:
    """The checkpoint a training run ended with."""
    return Path((work_dir / 'last_checkpoint').read_text().strip())


def _load(config: str, checkpoint: Path) -> EncoderDecoder:
    return init_model(resolve_config(config), str(checkpoint), 'cpu')


def _measure(
    models: dict[str, EncoderDecoder], size: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """GMACs and CPU time of one image in each model, timed in turns."""
    images = torch.randn(1, 3, *size)

    calls = {name: partial(model, images) for name, model in models.items()}
    with torch.no_grad():
        seconds = time_interleaved(calls)
    return {
        name: {
            'gmacs': count_macs(call) / 1e9,
            'ms': median(seconds[name]) * 1e3,
        }
        for name, call in calls.items()
    }


def _draw(
    path: Path, root: Path, dense: EncoderDecoder, small: EncoderDecoder
) -> None:
    """Groups of the last layer and predictions of four annotated scenes."""
    cfg = small.cfg.val_dataloader.dataset
    dataset = DATASETS.build({**cfg, 'data_root': str(root)})
    panels = []
    for index in range(4):
        one = inspect(small, dataset[index], dense)
        panels += [
            *one.prediction_panels(dense.dataset_meta),
            one.group_panels()[-1],
        ]
    save_figure(panel_figure(panels, len(panels) // 4), path)


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
    quiet_warnings()
    start = time.monotonic()
    work = Path(args.work_dir)
    data = work / 'data'
    dense_cfg = 'configs/demo/segmenter_scenes.py'
    small_cfg = 'configs/demo/segmenter_pm_scenes.py'
    scenes = ['--num-train', '160', '--num-val', '24']
    options = ['--cfg-options', f'data_root={data}', 'log_level=ERROR']
    if args.quick:
        scenes = ['--num-train', '16', '--num-val', '4']
        options += ['train_cfg.max_iters=2']

    console.rule('1. Data, and a dense Segmenter to start from')
    _run(make_scenes, str(data), *scenes)
    dense_dir, small_dir = work / 'dense', work / 'compressed'
    _run(train, dense_cfg, '--work-dir', str(dense_dir), *options)
    dense = _last(dense_dir)
    miou = {'dense': _run(test, dense_cfg, str(dense), *options)}

    console.rule('2. Compress it to half of its operations, without training')
    start_pth, report = work / 'compressed.pth', work / 'report.html'
    _run(
        compress, small_cfg, str(dense), '--out', str(start_pth),
        '--report', str(report), *options,
    )  # fmt: skip
    miou['compressed'] = _run(test, small_cfg, str(start_pth), *options)

    console.rule('3. Fine-tune the compressed model')
    _run(
        train, small_cfg, '--work-dir', str(small_dir), *options,
        f'load_from={start_pth}',
    )  # fmt: skip
    small = _last(small_dir)
    miou['compressed, fine-tuned'] = _run(
        test, small_cfg, str(small), *options
    )

    console.rule('4. Compare')
    models = {
        'dense': _load(dense_cfg, dense),
        'compressed': _load(small_cfg, start_pth),
        'compressed, fine-tuned': _load(small_cfg, small),
    }
    results = _measure(models, models['dense'].backbone.img_size)
    for name, metrics in miou.items():
        results[name]['miou'] = float(metrics['mIoU'])
    picture, numbers = work / 'demo.png', work / 'demo.json'
    _draw(picture, data, models['dense'], models['compressed, fine-tuned'])
    numbers.write_text(json.dumps(results, indent=2) + '\n')
    console.print(_table(results))
    console.print(
        f'Pictures: {picture}\nReport:   {report}\nNumbers:  {numbers}\n'
        f'Took {time.monotonic() - start:.0f} s. A model this small, trained '
        'this briefly, shows how\nthings work; see the README for results.'
    )


if __name__ == '__main__':
    main()
