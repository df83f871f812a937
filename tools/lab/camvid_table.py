r"""The CamVid comparison: every method at every budget, from one checkpoint.

Compress Segmenters on CamVid with every method, at equal shares of the MACs of
the layers or of the whole model, fine-tune them alike, test them, and write
one JSON line for each row and seed. Rows that are in the file already are not
run again; budgets that a method cannot reach are recorded as such.

examples:
  # all without training, one seed
  python tools/lab/camvid_table.py --iters 0 --seeds 0 \
      --out results/camvid_training_free.jsonl
  # two rows, 300 iterations each
  python tools/lab/camvid_table.py --rows 'ours 50%' 'ToMe-style 50%' \
      --iters 300 --seeds 0
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.registry import MODELS
from rich.console import Console
from rich.table import Table

from pm_seg.cli import compress, test, train
from pm_seg.cli.arguments import make_parser
from pm_seg.cli.config import load_config
from pm_seg.cli.ending import command
from pm_seg.utils import count_macs
from pm_seg.utils.checkpoints import read_checkpoint
from pm_seg.version import __version__

DENSE = 'configs/segmenter_vit-t_camvid.py'
OURS = 'configs/segmenter_vit-t_pm_camvid.py'
PAPER = 'configs/segmenter_vit-t_pm-paper_camvid.py'
SPLITS = ('val', 'test')
SHARES = (0.7, 0.5, 0.35, 0.25)
WHOLE_SHARES = (0.5, 0.4)
_BACKBONE = 'model.backbone.compression'


class Row(NamedTuple):
    """What is compressed and how much.

    Attributes:
        config (str): Its config.
        options (tuple[str, ...]): For ``--cfg-options``.
        compress (tuple[str, ...]): Arguments of compress.py; none for the
            dense model.
    """

    config: str
    options: tuple[str, ...] = ()
    compress: tuple[str, ...] = ()


def _settings(kind: str, *options: str) -> tuple[str, ...]:
    """The whole compression dict, nothing left of the config's own."""
    given = (f'type={kind}', '_delete_=True', *options)
    return tuple(f'{_BACKBONE}.{option}' for option in given)


#: Config, options of it, and further arguments of compress.py. The paper's
#: scores are those of augmented training crops.
METHODS: dict[str, Row] = {
    'ours': Row(OURS),
    'ours, no data': Row(OURS, (), ('--calib-batches', '0')),
    'ToMe-style': Row(OURS, _settings('tome')),
    'ToMe-style, residual': Row(OURS, _settings('tome', 'restore=residual')),
    'ALGM-style': Row(OURS, _settings('algm')),
    'ALGM-style, residual': Row(OURS, _settings('algm', 'restore=residual')),
    'paper': Row(PAPER, ('calib_pipeline=None',)),
}


def _rows() -> dict[str, Row]:
    rows = {'dense': Row(DENSE)}
    for share in SHARES:
        for name, (config, options, extra) in METHODS.items():
            budget = ('--keep', str(share), *extra)
            rows[f'{name} {share:.0%}'] = Row(config, options, budget)
    for share in WHOLE_SHARES:
        for name in ('ours', 'ToMe-style', 'paper'):
            config, options, extra = METHODS[name]
            budget = ('--target', f'share={share}', *extra)
            rows[f'{name}, whole model {share:.0%}'] = Row(
                config, options, budget
            )
    return rows


ROWS = _rows()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('lab/camvid_table.py', __doc__)
    group = parser.add_argument_group('files')
    for name, default, what in (
        ('data', 'data/camvid', 'folder of CamVid'),
        (
            'checkpoint',
            'checkpoints/segmenter_vit-t_camvid.pth',
            'dense checkpoint to start from',
        ),
        ('out', 'results/camvid.jsonl', 'file to add the rows to'),
        ('work-dir', 'work_dirs/camvid_table', 'logs and checkpoints'),
    ):
        group.add_argument(
            f'--{name}',
            default=default,
            metavar='PATH',
            help=f'{what} (default {default})',
        )
    group = parser.add_argument_group('what to run')
    group.add_argument(
        '--iters',
        type=int,
        default=700,
        metavar='N',
        help='iterations of fine-tuning, 0 for no training at all (default '
        '700)',
    )
    group.add_argument(
        '--seeds',
        type=int,
        nargs='+',
        default=[0, 1, 2],
        metavar='N',
        help='(default 0 1 2)',
    )
    group.add_argument(
        '--batch-size',
        type=int,
        default=8,
        metavar='N',
        help='images of a training iteration (default 8)',
    )
    group.add_argument(
        '--workers',
        type=int,
        default=2,
        metavar='N',
        help='processes that load images (default 2)',
    )
    group.add_argument(
        '--rows',
        nargs='+',
        choices=list(ROWS),
        default=ROWS,
        metavar='ROW',
        help='; '.join(ROWS).replace('%', '%%') + ' (default all)',
    )
    return parser.parse_args(argv)


def config_options(args: argparse.Namespace, row: Row, seed: int) -> list[str]:
    """What a row changes in its config, for ``--cfg-options``."""
    iters = max(args.iters, 1)
    step = max(iters // 10, 1)
    options = [
        'log_level=ERROR',
        f'data_root={args.data}',
        f'load_from={args.checkpoint}',
        f'randomness.seed={seed}',
        f'train_dataloader.dataset.pipeline.0.seed={seed}',
        f'train_dataloader.batch_size={args.batch_size}',
        f'train_cfg.max_iters={iters}',
        f'train_cfg.val_interval={10 * iters}',
        f'param_scheduler.0.end={step}',
        f'param_scheduler.1.begin={step}',
        f'param_scheduler.1.end={iters}',
        f'default_hooks.checkpoint.interval={iters}',
        'default_hooks.checkpoint.save_best=None',
    ]
    options += loader_options(args.workers)
    hooks = 2 if row.compress else 1
    options += [f'custom_hooks.{n}.seed={seed}' for n in range(hooks)]
    if row.compress:
        options.append(f'model.teacher.checkpoint={args.checkpoint}')
    return options + list(row.options)


def loader_options(workers: int) -> list[str]:
    """So many processes that load images, for ``--cfg-options``."""
    chosen = f'num_workers={workers}', f'persistent_workers={workers > 0}'
    return [
        f'{split}_dataloader.{option}'
        for split in ('train', 'val', 'test')
        for option in chosen
    ]


def _work_dir(args: argparse.Namespace, name: str, seed: int) -> Path:
    # --cfg-options take no blanks and no commas.
    plain = ''.join(c if c.isalnum() else '-' for c in name)
    return Path(args.work_dir) / f'{plain}-{seed}'


def scored(args: argparse.Namespace, name: str, seed: int) -> str:
    """What to compress: a checkpoint with the paper's scores, if there is one.

    The paper's scores do not depend on the budget; what ours measures does.
    """
    if ROWS[name].config == PAPER:
        for other, row in ROWS.items():
            path = _work_dir(args, other, seed) / 'iter_0.pth'
            if row.config == PAPER and path.exists():
                return str(path)
    return args.checkpoint


def run_row(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Compress, fine-tune and test one row; returns what goes to the file."""
    row, work = ROWS[name], _work_dir(args, name, seed)
    options = ['--cfg-options', *config_options(args, row, seed)]
    result = dict(row=name, seed=seed, iters=args.iters)
    if args.iters:
        result['batch_size'] = args.batch_size
    start = time.perf_counter()
    checkpoint = Path(args.checkpoint)
    if row.compress:
        checkpoint = work / 'iter_0.pth'
        try:
            compress.main(
                [
                    row.config, scored(args, name, seed),
                    '--out', str(checkpoint), *row.compress, *options,
                ]
            )  # fmt: skip
        except SystemExit as error:
            message = str(error.code).partition('\n')[0]
            if not any(t in message for t in ('out of reach', 'cannot be')):
                raise
            return dict(result, unreachable=message.removeprefix('Error: '))
    if args.iters:
        options.append(f'load_from={checkpoint}')
        train.main([row.config, '--work-dir', str(work), *options])
        checkpoint = work / f'iter_{args.iters}.pth'
    seconds = time.perf_counter() - start
    for split in SPLITS:
        prefix = 'test_dataloader.dataset.data_prefix'
        metrics = test.main(
            [
                row.config, str(checkpoint), '--work-dir', str(work),
                *options,
                f'{prefix}.img_path=images/{split}',
                f'{prefix}.seg_map_path=annotations/{split}',
            ]
        )  # fmt: skip
        result[f'{split}_miou'] = round(float(metrics['mIoU']), 2)
    return dict(
        result,
        **costs(row, checkpoint),
        seconds=round(seconds, 1),
        device=torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else 'CPU',
        torch=torch.__version__,
        pm_seg=__version__,
    )


def costs(row: Row, checkpoint: Path) -> dict[str, float]:
    """GMACs of the model and of the encoder, one 352x480 image; and the share
    of the dense layers' MACs.
    """
    cfg = load_config(
        train.parse_args(
            [row.config, '--cfg-options', 'log_level=ERROR', *row.options]
        )
    )
    model = MODELS.build(cfg.model).eval()
    state = read_checkpoint(checkpoint)
    model.load_state_dict(state.get('state_dict', state))
    images = torch.zeros(1, 3, *cfg.crop_size)
    compressor = model.backbone.compressor
    return dict(
        gmacs=round(count_macs(lambda: model(images, mode='tensor')) / 1e9, 3),
        encoder_gmacs=round(
            count_macs(lambda: model.backbone(images)) / 1e9, 3
        ),
        layers_share=1.0 if compressor is None else round(compressor.share, 4),
    )


def table(results: Iterable[dict]) -> Table:
    """Mean and spread (highest - lowest) over the seeds."""
    rows: dict[str, list[dict]] = {}
    for result in results:
        rows.setdefault(result['row'], []).append(result)
    out = Table(title='CamVid, Segmenter ViT-T')
    for column in ('row', 'GMACs', 'encoder', 'val mIoU', 'test mIoU', 'runs'):
        out.add_column(column, justify='left' if column == 'row' else 'right')
    for row, runs in rows.items():
        reached = [run for run in runs if 'unreachable' not in run]
        if not reached:
            out.add_row(row, 'out of reach')
            continue
        cells = [
            f'{reached[0][key]:.2f}' for key in ('gmacs', 'encoder_gmacs')
        ]
        for split in SPLITS:
            values = [run[f'{split}_miou'] for run in reached]
            mean, spread = sum(values) / len(values), max(values) - min(values)
            cells.append(f'{mean:.2f} ({spread:.2f})')
        out.add_row(row, *cells, str(len(reached)))
    return out


@command('The same command goes on with the rows that are missing.')
def main(argv: list[str] | None = None) -> None:
    """Run the rows that are missing and print the table."""
    args = parse_args(argv)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text().splitlines() if out.exists() else []
    results = [json.loads(line) for line in lines]
    done = {(r['row'], r['seed'], r['iters']) for r in results}
    for seed in args.seeds:
        for name in args.rows:
            if (name, seed, args.iters) in done:
                continue
            result = run_row(args, name, seed)
            results.append(result)
            with out.open('a') as file:
                file.write(json.dumps(result) + '\n')
            print(json.dumps(result), flush=True)
    Console(width=80).print(table(results))


if __name__ == '__main__':
    main()
