"""What the command line tools share: arguments, configs, checkpoints."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
import yaml
from mmengine.config import Config, DictAction
from mmengine.fileio import YamlHandler, register_handler

from ..stacks import installed_stacks
from ..utils.checkpoints import (
    CheckpointError,
    latest_intact_checkpoint,
    load_from_local,
    trusted,
)
from ..utils.quiet import quiet_warnings
from .data import check_data, datasets
from .parser import command, make_parser, wrong_usage

__all__ = [
    'add_common_arguments',
    'check_checkpoints',
    'check_data',
    'check_output',
    'command',
    'fetch_checkpoint',
    'fix_teacher',
    'load_config',
    'make_parser',
    'packaged_configs',
    'prepare_resume',
    'quiet_warnings',
    'resolve_config',
    'wrong_usage',
]

PACKAGE = Path(__file__).resolve().parents[1]


def packaged_configs() -> Path:
    """Folder of the configs: the checkout's, or the installed copy."""
    installed = PACKAGE / '.mim' / 'configs'
    return installed if installed.is_dir() else PACKAGE.parent / 'configs'


def resolve_config(name: str) -> str:
    """Path of a config given as a path or as the name of one of ours.

    Args:
        name (str): An existing file, or one of the package's configs with or
            without ``configs/`` in front and ``.py`` behind, from any
            working directory.

    Raises:
        SystemExit: If there is no such config; lists those there are.
    """
    if Path(name).is_file():
        return name
    folder = packaged_configs()
    relative = name.removeprefix('./').removeprefix('configs/')
    for candidate in (folder / relative, folder / f'{relative}.py'):
        if candidate.is_file():
            return str(candidate)
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob('*.py')
        if '_base_' not in path.parts
    )
    raise SystemExit(
        f'Config not found: {name}\nThe configs of pm_seg are:\n  '
        + '\n  '.join(names)
    )


def add_common_arguments(
    parser: argparse.ArgumentParser, runs: bool = False
) -> None:
    """``--work-dir``, ``--cfg-options`` and ``--launcher``, as in mmseg.

    Args:
        parser (argparse.ArgumentParser): What to add them to.
        runs (bool): Whether the tool is a run of mmengine. The others take
            ``--work-dir`` and ``--launcher`` too, but do not show them.
            Defaults to False.
    """
    group = parser.add_argument_group('config and run, as in mmseg')
    group.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override config settings, with dots for nested keys: '
        'train_dataloader.batch_size=2 model.backbone.compression.keep=0.5. '
        'Lists are key="[a,b]" or key=a,b. data_root=DIR sets the data root '
        'of all dataloaders',
    )
    group.add_argument(
        '--work-dir',
        metavar='DIR',
        help='folder for logs and checkpoints (default work_dirs/CONFIG)'
        if runs
        else argparse.SUPPRESS,
    )
    group.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how several processes were started; tools/dist_train.sh and '
        'tools/slurm_train.sh set it'
        if runs
        else argparse.SUPPRESS,
    )
    parser.add_argument(
        '--local_rank',
        '--local-rank',
        type=int,
        default=0,
        help=argparse.SUPPRESS,
    )


class _SafeYaml(YamlHandler):
    """YAML that is data; mmengine's own would build any Python object."""

    def load_from_fileobj(self, file, **kwargs) -> object:
        return yaml.safe_load(file)


def check_environment() -> None:
    """Refuse mixed installations; let torch load weights alone from here on.

    Raises:
        SystemExit: If two packages own the files of one module.
    """
    stacks = installed_stacks()
    if stacks.conflicts:
        raise SystemExit(f'Broken installation: {stacks.problem()}')
    if stacks.mixed:
        warnings.warn(stacks.problem(), stacklevel=2)
    register_handler(['yaml', 'yml'])(_SafeYaml)
    if not trusted():
        os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the common arguments.

    The work directory is, in this order, ``--work-dir``, the config's
    ``work_dir``, or ``work_dirs/CONFIG_NAME``.
    """
    check_environment()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    path = resolve_config(args.config)
    cfg = Config.fromfile(path)
    cfg.launcher = args.launcher
    options = args.cfg_options or {}
    old_root = cfg.get('data_root')
    cfg.merge_from_dict(options)
    if 'data_root' in options:
        for dataset in datasets(cfg):
            if old_root in (None, dataset.get('data_root')):
                dataset.data_root = options['data_root']
    if cfg.get('data_preprocessor'):  # where mmpretrain's configs have it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(path).stem)
    return cfg


def check_output(path: str | Path, folder: bool = False) -> None:
    """Stop before the work starts if its result could not be written.

    Args:
        path (str | Path): Of a file to write, or of a folder.
        folder (bool): Whether it is a folder. Defaults to False.

    Raises:
        SystemExit: Naming what is in the way.
    """
    path = Path(path)
    if not folder and path.is_dir():
        raise SystemExit(
            f'Cannot write {path}: it is a folder; give the name of a file'
        )
    parent = path if folder else path.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise SystemExit(
            f'Cannot write {path}: {parent} is a file, expected a folder; '
            'choose another place'
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SystemExit(
            f'Cannot write {path}: no permission to write in {parent}; '
            'choose another place, or change its permissions'
        )


def fetch_checkpoint(source: str) -> str:
    """Local path of a readable checkpoint; downloads it from an address.

    Args:
        source (str): A path, or an http(s) address. A file of the same name
            in ``checkpoints/`` is used instead of downloading. Only the first
            process of a machine downloads, the others wait for the file.

    Raises:
        SystemExit: Saying which file to put where, or what is wrong with it:
            damage, code in it, no weights.
    """
    path = _local_checkpoint(source)
    if '://' not in path:
        try:
            load_from_local(path, 'cpu')
        except CheckpointError as error:
            message = str(error)
            raise SystemExit(message[0].upper() + message[1:]) from None
    return path


def _local_checkpoint(source: str) -> str:
    if urlparse(source).scheme not in ('http', 'https'):
        if '://' in source or Path(source).is_file():
            return source
        raise SystemExit(
            f'Checkpoint not found: {source}\nGive the path of a .pth file, '
            'or for training without one add --cfg-options load_from=None.'
        )
    name = Path(urlparse(source).path).name
    local = Path('checkpoints') / name
    if local.is_file():
        return str(local)
    cached = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if cached.is_file():
        return str(cached)
    cached.parent.mkdir(parents=True, exist_ok=True)
    if _local_rank() > 0:
        # The machine's first process downloads; the launcher ends this one
        # if that fails.
        while not cached.is_file():
            time.sleep(1)
        return str(cached)
    print(f'Downloading {source}', file=sys.stderr)
    try:
        torch.hub.download_url_to_file(source, str(cached))
    except (URLError, OSError) as error:
        raise SystemExit(
            f'Could not download {source}\n({error})\nDownload it elsewhere '
            f'and put it at {local}, or start without it: --cfg-options '
            'load_from=None'
        ) from None
    return str(cached)


def _local_rank() -> int:
    """Number of this process on its machine, before they are joined."""
    if 'SLURM_LOCALID' in os.environ:
        return int(os.environ['SLURM_LOCALID'])
    return int(os.environ.get('LOCAL_RANK', 0))


def prepare_resume(cfg: Config) -> None:
    """Let the run go on from its own latest checkpoint, or start it.

    mmengine would take ``load_from``, the dense checkpoint, for the one to
    resume from. What a killed process left unfinished is removed.
    """
    for rest in Path(cfg.work_dir).glob('*.pth.*.partial'):
        rest.unlink(missing_ok=True)
    found = latest_intact_checkpoint(cfg.work_dir)
    cfg.resume = found is not None
    if found:
        cfg.load_from = found
    else:
        print(f'Nothing to resume in {cfg.work_dir}, starting anew')


def fix_teacher(cfg: Config) -> None:
    """Name the teacher's checkpoint: what the run starts from first."""
    teacher = cfg.model.get('teacher')
    if teacher is not None:
        checkpoint = teacher.get('checkpoint') or cfg.get('load_from')
        if checkpoint:
            teacher.checkpoint = fetch_checkpoint(checkpoint)
        else:
            print(
                'No dense checkpoint to distil from (load_from=None): '
                'training on labels alone',
                file=sys.stderr,
            )
            cfg.model.teacher = None


def check_checkpoints(cfg: Config) -> None:
    """Make ``load_from`` and pretrained weights local before work starts."""
    if cfg.get('resume'):
        return
    if cfg.get('load_from'):
        cfg.load_from = fetch_checkpoint(cfg.load_from)
        return  # pretrained weights would be overwritten
    model = cfg.model
    if model.get('pretrained'):
        model.pretrained = fetch_checkpoint(model.pretrained)
    backbone = model.get('backbone') or {}
    if isinstance(backbone.get('pretrained'), str):
        backbone.pretrained = fetch_checkpoint(backbone.pretrained)
    init_cfg = backbone.get('init_cfg')
    if isinstance(init_cfg, dict) and init_cfg.get('checkpoint'):
        init_cfg.checkpoint = fetch_checkpoint(init_cfg.checkpoint)
