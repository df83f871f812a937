"""The CamVid comparison: every row fine-tuned alike, several seeds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from mmengine.registry import MODELS, init_default_scope
from rich.console import Console
from rich.table import Table

from ..utils import count_macs
from ..utils.checkpoints import read_checkpoint
from ..version import __version__
from . import test, train
from .common import quiet_warnings

DENSE = 'configs/segmenter_vit-t_camvid.py'
COMPRESSED = 'configs/segmenter_vit-t_pm_camvid.py'
SPLITS = ('val', 'test')


def paper(keep: float) -> list[str]:
    """The paper's Segmenter: encoder blocks 1..11, row windows, 'replace'."""
    return [
        'model.decode_head.compression=None',
        f'model.backbone.compression.keep={keep}',
        'model.backbone.compression.builder=row_window',
        'model.backbone.compression.restore=replace',
    ]


#: Config and options of each row.
ROWS: dict[str, tuple[str, list[str]]] = {
    'dense': (DENSE, []),
    'paper, keep 0.7': (COMPRESSED, paper(0.7)),
    'paper, keep 0.5': (COMPRESSED, paper(0.5)),
    'ours, keep 0.7': (COMPRESSED, []),
    'ours, keep 0.5': (
        COMPRESSED,
        [
            'model.backbone.compression.keep=0.5',
            'model.decode_head.compression.keep=0.5',
        ],
    ),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='camvid_table.py',
        description='Fine-tune dense and compressed Segmenters on CamVid '
        'from one dense checkpoint and write one JSON line for each row and '
        'seed. Rows that are in the file already are not run again.',
        epilog='Example: python tools/camvid_table.py --data data/camvid '
        '--checkpoint checkpoints/segmenter_vit-t_camvid.pth --out '
        'results/camvid.jsonl',
    )
    parser.add_argument('--data', default='data/camvid')
    parser.add_argument(
        '--checkpoint', default='checkpoints/segmenter_vit-t_camvid.pth'
    )
    parser.add_argument('--out', default='results/camvid.jsonl')
    parser.add_argument('--work-dir', default='work_dirs/camvid_table')
    parser.add_argument('--iters', type=int, default=700)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--rows', nargs='+', choices=list(ROWS), default=ROWS)
    return parser.parse_args(argv)


def _options(args: argparse.Namespace, seed: int) -> list[str]:
    step = max(args.iters // 10, 1)
    return [
        'log_level=ERROR',
        f'data_root={args.data}',
        f'load_from={args.checkpoint}',
        f'randomness.seed={seed}',
        f'train_dataloader.dataset.pipeline.0.seed={seed}',
        f'train_cfg.max_iters={args.iters}',
        f'train_cfg.val_interval={10 * args.iters}',
        f'param_scheduler.0.end={step}',
        f'param_scheduler.1.begin={step}',
        f'param_scheduler.1.end={args.iters}',
        f'default_hooks.checkpoint.interval={args.iters}',
        'default_hooks.checkpoint.save_best=None',
        f'train_dataloader.num_workers={args.workers}',
    ]


def run_row(args: argparse.Namespace, row: str, seed: int) -> dict:
    """Fine-tune and test one row, and return what goes to the file."""
    config, extra = ROWS[row]
    work = Path(args.work_dir) / f'{row.replace(", ", "-")}-{seed}'
    options = ['--cfg-options', *_options(args, seed), *extra]
    if config == COMPRESSED:
        options.append('custom_hooks.0.evaluate=False')
    options.append(f'custom_hooks.{int(config == COMPRESSED)}.seed={seed}')
    train.main([config, '--work-dir', str(work), *options])
    checkpoint = work / f'iter_{args.iters}.pth'
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
    result['gmacs'] = _gmacs(config, extra, checkpoint)
    result['device'] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
    )
    result['torch'] = torch.__version__
    result['pm_seg'] = __version__
    return result


def _gmacs(config: str, extra: list[str], checkpoint: Path) -> float:
    args = train.parse_args(
        [config, '--cfg-options', 'log_level=ERROR', *extra]
    )
    cfg = train.load_config(args)
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    state = read_checkpoint(checkpoint)
    model.load_state_dict(state['state_dict'])
    images = torch.zeros(1, 3, *cfg.crop_size)
    return count_macs(lambda: model(images, mode='tensor')) / 1e9


def table(results: Iterable[dict]) -> Table:
    """Mean and spread (highest - lowest) over the seeds."""
    rows: dict[str, list[dict]] = {}
    for result in results:
        rows.setdefault(result['row'], []).append(result)
    out = Table(title='CamVid, Segmenter ViT-T')
    for column in ('row', 'GMACs', 'val mIoU', 'test mIoU', 'seeds'):
        out.add_column(column, justify='left' if column == 'row' else 'right')
    for row, runs in rows.items():
        cells = [row, f'{runs[0]["gmacs"]:.2f}']
        for split in SPLITS:
            values = [run[f'{split}_miou'] for run in runs]
            mean, spread = sum(values) / len(values), max(values) - min(values)
            cells.append(f'{mean:.2f} ({spread:.2f})')
        out.add_row(*cells, str(len(runs)))
    return out


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
