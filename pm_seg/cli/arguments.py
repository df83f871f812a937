"""Help that teaches, and arguments that several tools take."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from mmengine.config import DictAction


def make_parser(prog: str, doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a tool.

    It ends with what is there from the line 'example:' or 'examples:' on.
    """
    about, _, examples = doc.partition('\nexample')
    codes = 'exit codes: 0 done, 1 failed, 2 wrong usage'
    return argparse.ArgumentParser(
        prog=prog,
        description=about,
        epilog=f'example{examples}\n{codes}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """The config, and ``--cfg-options`` as in mmseg."""
    parser.add_argument('config', help='config file, or the name of one')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override config settings, with dots for nested keys: '
        'train_dataloader.batch_size=2 model.backbone.compression.keep=0.5. '
        'Lists are key="[a,b]" or key=a,b. data_root=DIR sets the data root '
        'of all dataloaders',
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """What runs of mmengine take, as in mmseg."""
    parser.add_argument(
        '--work-dir',
        metavar='DIR',
        help='folder for logs and checkpoints (default work_dirs/CONFIG)',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how several processes were started; tools/dist_train.sh and '
        'tools/slurm_train.sh set it',
    )
    parser.add_argument(
        '--local_rank', '--local-rank', default='0', help=argparse.SUPPRESS
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    """The GPU, if there is one."""
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='defaults to cuda if there is one',
    )


def add_size(parser: argparse._ActionsContainer) -> None:
    """Height and width of images."""
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        metavar=('H', 'W'),
        help="image size, any; defaults to the backbone's img_size",
    )


def output_file(path: str) -> Path:
    """Type of arguments: a file that can be written; stops if it cannot."""
    if Path(path).is_dir():
        raise SystemExit(
            f'Cannot write {path}: it is a folder; give the name of a file'
        )
    output_folder(Path(path).parent)
    return Path(path)


def output_folder(path: str | Path) -> Path:
    """The same for a folder, which may have to be made."""
    path = Path(path)
    above = next(p for p in (path, *path.parents) if p.exists())
    if not above.is_dir():
        raise SystemExit(
            f'Cannot write to {path}: {above} is a file, expected a folder; '
            'choose another place'
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise SystemExit(
            f'Cannot write to {path}: no permission to write in {above}; '
            'choose another place, or change its permissions'
        )
    return path
