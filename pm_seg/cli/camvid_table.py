"""The CamVid comparison: every row fine-tuned alike, several seeds."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table

from ..utils import count_macs
from ..utils.checkpoints import read_checkpoint
from ..version import __version__
from . import compress, test, train
from .common import command, make_parser, quiet_warnings

DENSE = 'configs/segmenter_vit-t_camvid.py'
COMPRESSED = 'configs/segmenter_vit-t_pm_camvid.py'
SPLITS = ('val', 'test')


BACKBONE = 'model.backbone.compression'
HEAD_DENSE = 'model.decode_head.compression=None'
SHARES = (0.7, 0.5, 0.35)

#: The paper's Segmenter: blocks 1..11, row windows, 'replace', one threshold
#: in each block, scores from augmented training crops. (From whole images it
#: keeps 13 instead of 49 mIoU at 70 %, without training.)
PAPER = [
    f'{BACKBONE}.builder=row_window',
    f'{BACKBONE}.restore=replace',
    f'{BACKBONE}.budget=layer',
    f'{BACKBONE}.layers={list(range(1, 12))}',
    'calib_pipeline=None',
]
METHODS: dict[str, list[str]] = {
    'paper': PAPER,
    'ours': [],
    'ours, static': [f'{BACKBONE}.adapt=0'],
    'matching': [f'{BACKBONE}.builder=matching'],
    'ToMe-style': [f'{BACKBONE}.type=tome'],
    'ALGM-style': [f'{BACKBONE}.type=algm'],
}
#: One default of ours changed at a time.
ABLATIONS: dict[str, list[str]] = {
    "restore 'replace'": [f'{BACKBONE}.restore=replace'],
    'no detail path': [f'{BACKBONE}.detail=0'],
    'centres by score': [f'{BACKBONE}.centres=score'],
    'even centres': [f'{BACKBONE}.score_power=0'],
    'two rounds': [f'{BACKBONE}.adapt=2'],
    'no rotation': [f'{BACKBONE}.rotate=False'],
    'augmented calibration': ['calib_pipeline=None'],
    'flat budget': [f'{BACKBONE}.budget=layer'],
    'four dense blocks': [
        f'{BACKBONE}.budget=layer',
        f'{BACKBONE}.layers={list(range(4, 12))}',
    ],
    'labels only': ['model.teacher=None'],
    'labels and teacher': ['model.teacher.alpha=0.5'],
}


def _rows() -> dict[str, tuple[str, list[str]]]:
    """Config and options of each row."""

    def compressed(share: float, options: list[str]) -> tuple:
        target = f'custom_hooks.0.target.backbone_share={share}'
        return COMPRESSED, [HEAD_DENSE, target, *options]

    rows = {'dense': (DENSE, [])}
    for share in SHARES:
        for method, options in METHODS.items():
            rows[f'{method} {share:.0%}'] = compressed(share, options)
    for change, options in ABLATIONS.items():
        rows[f'ours 50%, {change}'] = compressed(0.5, options)
    return rows


ROWS = _rows()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'camvid_table.py',
        'Fine-tune dense and compressed Segmenters on CamVid from one dense '
        'checkpoint, at equal shares of the GMACs of the encoder, and write '
        'one JSON line for each row and seed. Rows that are in the file '
        'already are not run again.',
        (
            'two rows without training, one seed',
            "--rows 'ours 50%' 'ToMe-style 50%' --iters 0 --seeds 0",
        ),
        ('everything, 700 iterations and three seeds each', ''),
    )
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


def _options(args: argparse.Namespace, seed: int) -> list[str]:
    iters = max(args.iters, 1)
    step = max(iters // 10, 1)
    return [
        'log_level=ERROR',
        f'data_root={args.data}',
        f'load_from={args.checkpoint}',
        f'randomness.seed={seed}',
        f'train_dataloader.dataset.pipeline.0.seed={seed}',
        f'train_cfg.max_iters={iters}',
        f'train_cfg.val_interval={10 * iters}',
        f'param_scheduler.0.end={step}',
        f'param_scheduler.1.begin={step}',
        f'param_scheduler.1.end={iters}',
        f'default_hooks.checkpoint.interval={iters}',
        'default_hooks.checkpoint.save_best=None',
        f'train_dataloader.num_workers={args.workers}',
    ]


def _work_dir(args: argparse.Namespace, row: str, seed: int) -> Path:
    return Path(args.work_dir) / f'{row.replace(", ", "-")}-{seed}'


def _scored(args: argparse.Namespace, row: str, seed: int) -> str:
    """Checkpoint of the same method at another share, or the dense one.

    What was measured is in it: the result is the same, without measuring.
    """
    config, (head, _, *options) = ROWS[row]
    for other, (other_config, extra) in ROWS.items():
        path = _work_dir(args, other, seed) / 'iter_0.pth'
        same = other_config == config and extra[:1] + extra[2:] == [
            head,
            *options,
        ]
        if same and other != row and path.exists():
            return str(path)
    return args.checkpoint


def run_row(args: argparse.Namespace, row: str, seed: int) -> dict:
    """Fine-tune and test one row, and return what goes to the file."""
    config, extra = ROWS[row]
    work = _work_dir(args, row, seed)
    options = ['--cfg-options', *_options(args, seed), *extra]
    if config == COMPRESSED:
        options.append('custom_hooks.0.evaluate=False')
    options.append(f'custom_hooks.{int(config == COMPRESSED)}.seed={seed}')
    if config == COMPRESSED:
        options.append(f'custom_hooks.0.seed={seed}')
    start = time.perf_counter()
    checkpoint = work / f'iter_{args.iters}.pth'
    if args.iters:
        train.main([config, '--work-dir', str(work), *options])
    elif config == COMPRESSED:
        target = ['--target', extra[1].partition('target.')[2]]
        start_from = _scored(args, row, seed)
        compress.main(
            [config, start_from, '--out', str(checkpoint), *target, *options]
        )
    else:
        checkpoint = Path(args.checkpoint)
    seconds = time.perf_counter() - start
    result = dict(row=row, seed=seed, iters=args.iters)
    for split in SPLITS:
        prefix = 'test_dataloader.dataset.data_prefix'
        metrics = test.main(
            [
                config, str(checkpoint), '--work-dir', str(work), *options,
                f'{prefix}.img_path=images/{split}',
                f'{prefix}.seg_map_path=annotations/{split}',
            ]
        )  # fmt: skip
        result[f'{split}_miou'] = float(metrics['mIoU'])
    result.update(_gmacs(config, extra, checkpoint))
    result['seconds'] = round(seconds, 1)
    result['device'] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    )
    result['torch'] = torch.__version__
    result['pm_seg'] = __version__
    return result


def _gmacs(
    config: str, extra: list[str], checkpoint: Path
) -> dict[str, float]:
    """GMACs of the model and of the encoder, one 352x480 image."""
    args = train.parse_args(
        [config, '--cfg-options', 'log_level=ERROR', *extra]
    )
    cfg = train.load_config(args)
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    state = read_checkpoint(checkpoint)
    model.load_state_dict(state.get('state_dict', state))
    images = torch.zeros(1, 3, *cfg.crop_size)
    return dict(
        gmacs=count_macs(lambda: model(images, mode='tensor')) / 1e9,
        encoder_gmacs=count_macs(lambda: model.backbone(images)) / 1e9,
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
        macs = [f'{runs[0][key]:.2f}' for key in ('gmacs', 'encoder_gmacs')]
        cells = [row, *macs]
        for split in SPLITS:
            values = [run[f'{split}_miou'] for run in runs]
            mean, spread = sum(values) / len(values), max(values) - min(values)
            cells.append(f'{mean:.2f} ({spread:.2f})')
        out.add_row(*cells, str(len(runs)))
    return out


@command('The same command goes on with the rows that are missing.')
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/camvid_table.py``."""
    args = parse_args(argv)
    quiet_warnings()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_text().splitlines() if out.exists() else []
    results = [json.loads(line) for line in lines]
    done = {(r['row'], r['seed'], r['iters']) for r in results}
    for seed in args.seeds:
        for row in args.rows:
            if (row, seed, args.iters) in done:
                continue
            result = run_row(args, row, seed)
            results.append(result)
            with out.open('a') as file:
                file.write(json.dumps(result) + '\n')
            print(json.dumps(result), flush=True)
    Console(width=80).print(table(results))


if __name__ == '__main__':
    main()
