r"""All that a GPU has to show, in one command that may be stopped.

Check that the GPU computes what the CPU does, then measure speed and memory,
fine-tune on CamVid and CIFAR-10, most important first. Each row is written
when it is made: the same command goes on with those that are missing. Ends in
Markdown tables and a picture.

examples:
  # on a GPU, half an hour
  python tools/gpu_report.py --data gpu_data --out work_dirs/gpu
  # prepare the data for a machine without network
  python tools/gpu_report.py --pack gpu_data --only accuracy --data data \
      --checkpoint checkpoints/segmenter_vit-t_camvid.pth
  # rehearse on a CPU
  python tools/gpu_report.py --tiny --device cpu --only checks speed \
      --out work_dirs/gpu_tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import gpu_rows
import torch
from gpu_rows import CIFAR_ROWS, TIMM, TOME
from gpu_tables import PICTURED, plot, report

from pm_seg.cli.arguments import make_parser, output_folder
from pm_seg.cli.bench_models import METHODS
from pm_seg.cli.ending import command, wrong_usage
from pm_seg.utils.checkpoints import read_checkpoint

PARTS = ('checks', 'speed', 'accuracy', 'cifar')
MEBIBYTES = 60  # of a folder to carry
Task = tuple[str, dict, Callable[[], dict]]


class TimeUpError(BaseException):
    """The time is over; nothing between here and ``main`` shall catch it."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('gpu_report.py', __doc__)
    for flag, default, metavar, text in (
        ('minutes', 25.0, 'N', 'stop after so many'),
        (
            'data', Path('data'), 'DIR',
            'folder with camvid/, cifar10/ or cifar10.zip, '
            'segmenter_vit-t_camvid.pth and vit-tiny_in1k.pth',
        ),
        ('out', Path('work_dirs/gpu_report'), 'DIR', 'folder to write to'),
        ('rounds', 21, 'N', 'how often each model is timed'),
        ('workers', 8, 'N', 'processes that load images'),
        (
            'device', 'cuda' if torch.cuda.is_available() else 'cpu', 'NAME',
            'where to run',
        ),
    ):  # fmt: skip
        parser.add_argument(
            f'--{flag}',
            type=Path if metavar == 'DIR' else type(default),
            default=default,
            metavar=metavar,
            help=f'{text} (default {default})',
        )
    parser.add_argument(
        '--checkpoint',
        type=Path,
        metavar='FILE',
        help='the dense Segmenter on CamVid, where it is not in --data',
    )
    parser.add_argument(
        '--pack',
        type=Path,
        metavar='DIR',
        help='measure nothing; write what --only needs of --data to this '
        f'folder, at most {MEBIBYTES} MiB, weights in half precision',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        choices=PARTS,
        default=PARTS,
        metavar='PART',
        help=f'of {", ".join(PARTS)} (default all)',
    )
    parser.add_argument(
        '--tiny',
        action='store_true',
        help='small models and one iteration, to rehearse on a CPU',
    )
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        args.checkpoint = gpu_rows.default_checkpoint(args.data)
    return args


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    """Key, fields and function of every row, most important first."""
    for name in METHODS:
        yield _task(args, 'check', gpu_rows.check_row, row=f'{name} 50%')
    yield from _speed_tasks(args, *_FIRST)
    yield from _speed_tasks(args, *_SECOND)
    for seed in (0, 1, 2):
        for name in _ACCURACY:
            yield _task(
                args, 'accuracy', gpu_rows.accuracy_row, row=name, seed=seed
            )
        if seed == 0:
            yield from _speed_tasks(args, *_THIRD)
            for name in CIFAR_ROWS:
                yield _task(args, 'cifar', gpu_rows.cifar_row, row=name)
            yield from _speed_tasks(args, *_LAST)


_HALF = ('dense', 'ours 50%')
_DEIT = ('dense', 'ours 60%')
_MORE = ('ours 70%', 'ours 35%', 'ToMe-style 50%', 'ALGM-style 50%')
_ALL = (*_HALF, *_MORE, 'paper 50%')
_ACCURACY = (
    'dense', 'ours 50%', 'ours 35%', 'ours 25%', 'ToMe-style 50%',
    'ALGM-style 50%', 'paper 50%',
)  # fmt: skip
_S, _L = 'Seg-S 512, batch {}', 'Seg-L 640, batch {}'
_DS, _DB = 'DeiT-S 224, batch 256', 'DeiT-B 224, batch 256'
#: Setting, modes, whether it trains, rows.
_FIRST = (
    (_S.format(32), ('eager', 'compiled'), False, _HALF),
    (_L.format(8), ('eager', 'compiled'), False, _HALF),
    (_S.format(1), ('cudagraph',), False, _HALF),
    (_L.format(1), ('cudagraph',), False, _HALF),
    (_DS, ('eager', 'compiled'), False, _DEIT),
    (_S.format(32), ('eager',), True, _HALF),
    (_L.format(8), ('eager',), True, _HALF),
)
_SECOND = (
    (_S.format(32), ('eager',), False, _ALL),
    (_L.format(8), ('eager',), False, _ALL),
    (_DS, ('eager',), False, (*_DEIT, *_ALL, TIMM, TOME)),
    (PICTURED, ('eager',), False, _ACCURACY),
)
_THIRD = (
    (PICTURED, ('compiled',), False, _ACCURACY),
    (_S.format(32), ('compiled',), False, _ALL),
    (_S.format(1), ('eager', 'compiled'), False, _HALF),
    (_L.format(1), ('eager', 'compiled'), False, _HALF),
    (_DS, ('compiled',), False, (*_DEIT, 'ToMe-style 60%', TIMM)),
    (_DS, ('eager',), True, _DEIT),
)
_LAST = (
    ('Seg-B 512, batch 32', ('eager', 'compiled'), False, _HALF),
    (_DB, ('eager', 'compiled'), False, (*_DEIT, TIMM, TOME)),
    (_S.format(32), ('compiled',), True, _HALF),
    (_L.format(8), ('compiled',), False, _ALL),
    (_DS, ('cudagraph',), False, _DEIT),
)


def _speed_tasks(args: argparse.Namespace, *plans: tuple) -> Iterator[Task]:
    for setting, modes, train, names in plans:
        for mode in modes:
            if args.tiny and mode != 'eager':
                continue  # compiling takes longer than all the rest
            for name in dict.fromkeys(names):
                yield _task(
                    args, 'speed', gpu_rows.speed_row, setting=setting,
                    mode=mode, train=train, row=name,
                )  # fmt: skip


def _task(
    args: argparse.Namespace, kind: str, function: Callable, **fields
) -> Task:
    key = ' | '.join((kind, *(str(value) for value in fields.values())))
    return (
        key,
        dict(kind=kind, **fields),
        partial(function, args, *fields.values()),
    )


def read_rows(file: Path) -> list[dict]:
    """Rows of earlier runs, without one that was cut off."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    # What failed is tried again.
    rows = [row for row in rows if 'error_text' not in row]
    part = file.with_suffix('.part')
    part.write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
    part.replace(file)
    return rows


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeUpError` after so many seconds inside the block."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeUpError

    previous = signal.signal(signal.SIGALRM, stop)
    # Again and again: Python drops what is raised while it frees an object.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run(args: argparse.Namespace, file: Path, rows: list[dict]) -> None:
    """Make the rows that are missing, each written when it is there."""
    done = {row['key'] for row in rows}
    parts = {f'{part.removesuffix("s")}' for part in args.only}
    for key, fields, function in tasks(args):
        if key in done or fields['kind'] not in parts:
            continue
        done.add(key)
        start = time.perf_counter()
        try:
            result = function()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            result = dict(error_text=f'{type(error).__name__}: {error}'[:300])
        seconds = round(time.perf_counter() - start, 1)
        row = {**result, **fields, 'key': key, 'seconds': seconds}
        row.update(gpu_rows.about(args))
        with file.open('a') as stream:
            stream.write(json.dumps(row) + '\n')
        rows.append(row)
        print(json.dumps(row), flush=True)
        gpu_rows.release(args.device)


def check_data(args: argparse.Namespace) -> None:
    """Stop before rows are made that lack data; unpack what is packed."""
    images, archive = args.data / 'cifar10', args.data / 'cifar10.zip'
    if 'cifar' in args.only and archive.exists() and not images.exists():
        unpacked = images.with_suffix('.part')
        zipfile.ZipFile(archive).extractall(unpacked)
        unpacked.replace(images)
    weights = args.data / 'vit-tiny_in1k.pth'
    for part, path in (
        ('accuracy', args.data / 'camvid'),
        ('accuracy', args.checkpoint),
        ('cifar', images),
        ('cifar', weights),
    ):
        if part in args.only and not path.exists():
            wrong_usage(
                f'{path} is missing; give --data and --checkpoint, or leave '
                f'{part} out with --only'
            )


def pack(args: argparse.Namespace) -> None:
    """Write what the parts need to a folder that is small enough."""
    target, room = args.pack, MEBIBYTES * 2**20
    target.mkdir(parents=True, exist_ok=True)
    weights = {}
    if 'accuracy' in args.only:
        shutil.copytree(
            args.data / 'camvid', target / 'camvid', dirs_exist_ok=True
        )
        weights[gpu_rows.default_checkpoint(target)] = args.checkpoint
    if 'cifar' in args.only:
        source = args.data / 'vit-tiny_in1k.pth'
        weights[target / source.name] = source
    for path, source in weights.items():
        state = read_checkpoint(source)
        state = state.get('state_dict', state).items()
        state = {k: v.half() if v.is_floating_point() else v for k, v in state}
        torch.save(dict(state_dict=state), path)
    files = [path for path in target.rglob('*') if path.is_file()]
    room -= sum(path.stat().st_size for path in files)
    if room < 0:
        raise SystemExit(
            f'{target} is {-room / 2**20:.0f} MiB larger than {MEBIBYTES}; '
            'pack one of --only accuracy and --only cifar at a time'
        )
    if 'cifar' in args.only:
        _pack_cifar(args.data / 'cifar10', target / 'cifar10.zip', room)
    print(f'{target} is packed')


def _pack_cifar(source: Path, file: Path, room: int) -> None:
    """As many images as there is room for, of all classes alike."""
    folders = [path for path in source.glob('*/*') if path.is_dir()]
    images = [sorted(folder.iterdir()) for folder in folders]
    with zipfile.ZipFile(file, 'w') as archive:
        for row in zip(*images):
            room -= sum(path.stat().st_size + 250 for path in row)
            if room < 0:
                break
            for path in row:
                archive.write(path, path.relative_to(source))


@command('The same command goes on with the rows that are missing.')
def main(argv: list[str] | None = None) -> None:
    """Make the rows that are missing and write tables and picture."""
    args = parse_args(argv)
    output_folder(args.pack or args.out)
    check_data(args)
    if args.pack:
        pack(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / 'rows.jsonl'
    rows = read_rows(file)
    try:
        with limited(60 * args.minutes):
            run(args, file, rows)
    except TimeUpError:
        print(f'{args.minutes:g} minutes are over; the same command goes on')
    finally:
        (args.out / 'report.md').write_text(report(rows))
        plot(rows, args.out / 'speed_miou.png')
        print(f'{args.out / "report.md"}, {len(rows)} rows')


if __name__ == '__main__':
    main()
