"""The whole story in minutes: compress, fine-tune, measure, draw."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from mmseg.apis import inference_model, init_model
from mmseg.models import EncoderDecoder
from rich.console import Console
from rich.table import Table

from ..core import GroupRecorder
from ..datasets.scenes import CLASS_IDS
from ..utils import count_macs, median, time_interleaved
from ..visualization import (
    Panel,
    draw_groups,
    paint_labels,
    panel_figure,
    save_figure,
)
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

    def call(model: EncoderDecoder):
        return lambda: model(images)

    with torch.no_grad():
        seconds = time_interleaved({n: call(m) for n, m in models.items()})
    return {
        name: {
            'gmacs': count_macs(call(model)) / 1e9,
            'ms': median(seconds[name]) * 1e3,
        }
        for name, model in models.items()
    }


def _draw(
    path: Path, root: Path, dense: EncoderDecoder, small: EncoderDecoder
) -> None:
    """Image, groups, both predictions and the annotation of four scenes."""
    palette = dense.dataset_meta['palette']
    label_map = np.full(256, 255, np.uint8)
    classes = dense.dataset_meta['classes']
    for new, name in enumerate(classes):
        label_map[CLASS_IDS[name]] = new
    compressor = small.backbone.compressor
    layer = compressor.shape.depth - 1
    titles = ('image', f'token groups, layer {layer}', 'dense', 'compressed',
              'annotation')  # fmt: skip
    panels = []
    for file in sorted((root / 'images' / 'validation').iterdir())[:4]:
        image = cv2.imread(str(file))
        truth = cv2.imread(
            str(root / 'annotations' / 'validation' / f'{file.stem}.png'), 0
        )
        with GroupRecorder(compressor) as recorder:
            predictions = [
                inference_model(model, image).pred_sem_seg.data[0].numpy()
                for model in (dense, small)
            ]
        rgb = image[..., ::-1]
        height, width = recorder.grid
        group = recorder.groups[layer][0].view(height, width).numpy()
        even = cv2.resize(rgb, (16 * width, 16 * height))
        groups = cv2.resize(draw_groups(even, group), rgb.shape[1::-1])
        labels = [*predictions, label_map[truth]]
        images = rgb, groups, *(paint_labels(m, palette) for m in labels)
        panels += map(Panel, titles, images)
    save_figure(panel_figure(panels, len(titles)), path)


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
