"""What the command line tools share: arguments, configs, early checks."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse

import torch
import yaml
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.fileio import YamlHandler, register_handler
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from mmseg.registry import DATASETS

from ..stacks import installed_stacks
from ..utils.checkpoints import (
    CheckpointError,
    latest_intact_checkpoint,
    load_from_local,
    trusted,
)
from ..utils.quiet import is_for_people, quiet_warnings
from .parser import command, make_parser, wrong_usage

__all__ = [
    'ToolRunner',
    'add_common_arguments',
    'build_runner',
    'check_checkpoints',
    'check_data',
    'command',
    'fetch_checkpoint',
    'fix_teacher',
    'join_cpu_processes',
    'load_config',
    'make_parser',
    'packaged_configs',
    'prepare_resume',
    'quiet_warnings',
    'resolve_config',
    'wrong_usage',
]

PACKAGE = Path(__file__).resolve().parents[1]

_DATASET_HELP = {
    'ADE20KDataset': (
        'ADE20K: "python tools/prepare_ade20k.py" downloads and unpacks '
        'ADEChallengeData2016.zip, so that images/ and annotations/ lie in '
        'the data root.'
    ),
    'CamVidDataset': (
        'CamVid: put images/{train,val,test} and annotations/'
        '{train,val,test} (class indices 0-10, 255 ignored) in the data root.'
    ),
    'ImageNet': (
        'ImageNet: put train/ and val/, with a folder of pictures for each '
        'class, in the data root; or pictures and the annotation file the '
        'config names.'
    ),
    'CityscapesDataset': (
        'Cityscapes: unpack leftImg8bit_trainvaltest.zip and '
        'gtFine_trainvaltest.zip in the data root, then make the '
        '*_labelTrainIds.png: pip install cityscapesscripts; '
        'CITYSCAPES_DATASET=DATA_ROOT csCreateTrainIdLabelImgs'
    ),
    'PascalContextDataset': (
        'Pascal Context: put JPEGImages of VOC2010, SegmentationClassContext '
        'and ImageSets/SegmentationContext in the data root; '
        'tools/dataset_converters/pascal_context.py of mmsegmentation makes '
        'the latter two.'
    ),
    'CustomDataset': 'Put a folder of pictures for each class there.',
}
_DATASET_FALLBACK = (
    'No data at hand? "python tools/make_scenes.py data/scenes" draws scenes '
    'in ADE20K layout.'
)


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
        for dataset in _datasets(cfg):
            if old_root in (None, dataset.get('data_root')):
                dataset.data_root = options['data_root']
    if cfg.get('data_preprocessor'):  # where mmpretrain's configs have it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(path).stem)
    return cfg


def _for_people(runner: Runner | FlexibleRunner, logger: MMLogger) -> None:
    """Say where the log file is, and leave what it alone needs to it."""
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(is_for_people)
    file = f'{runner.log_dir}/{runner.timestamp}.log'
    logger.info(f'Config, environment and log: {file}')


class ToolRunner(Runner):
    """mmengine's runner, with a console for people.

    The environment, the config and the order of the hooks go to the log file
    alone, see :data:`pm_seg.utils.quiet.LOG_NOISE`.
    """

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        _for_people(self, logger)
        return logger


class FlexibleToolRunner(FlexibleRunner):
    """The same of mmengine's runner for FSDP and other strategies."""

    def _log_env(self) -> None:
        _for_people(self, self.logger)
        super()._log_env()


def build_runner(cfg: Config) -> Runner | FlexibleRunner:
    """The runner of a config, its ``runner_type`` or mmengine's usual one."""
    kind = cfg.get('runner_type', 'Runner')
    tools = dict(Runner=ToolRunner, FlexibleRunner=FlexibleToolRunner)
    return tools[kind].from_cfg(cfg) if kind in tools else RUNNERS.build(cfg)


def join_cpu_processes(cfg: Config) -> None:
    """Let ``--launcher pytorch`` work on machines without an accelerator.

    mmengine's launcher asks for CUDA; here the processes are joined by gloo
    before, which it accepts. Does nothing where there is an accelerator.
    """
    if cfg.launcher != 'pytorch' or get_device() != 'cpu':
        return
    torch.distributed.init_process_group('gloo')
    wrapper = (cfg.get('strategy') or {}).get('model_wrapper')
    if wrapper:  # FSDP would move to a GPU
        wrapper.device_id = torch.device('cpu')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )


def _datasets(
    cfg: Config, loaders: tuple[str, ...] = ('train', 'val', 'test')
) -> Iterator[ConfigDict]:
    """Dataset dicts with a data root, those inside wrappers included."""

    def walk(node: object) -> Iterator[ConfigDict]:
        if isinstance(node, dict):
            if 'data_root' in node:
                yield node
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                yield from walk(value)

    for loader in loaders:
        yield from walk(cfg.get(f'{loader}_dataloader'))


def _data_paths(dataset: ConfigDict) -> list[Path]:
    """Folders and files a dataset reads, as far as its config tells."""
    root = Path(dataset.data_root or '.')
    prefix = dataset.get('data_prefix') or ''
    if isinstance(prefix, dict):
        paths = [root / folder for folder in prefix.values()]
        if dataset.get('ann_file'):
            paths.append(root / dataset.ann_file)
        return paths
    if dataset.get('type') not in ('ImageNet', 'CustomDataset'):
        return []  # may download itself
    paths = [root / (prefix or dataset.get('split') or '')]
    if dataset.get('ann_file'):
        paths.append(root / dataset.ann_file)
    return paths


def check_data(cfg: Config, *loaders: str) -> None:
    """Stop with one clear message if a dataset is not there.

    Args:
        cfg (Config): The config.
        *loaders (str): Which of 'train', 'val' and 'test' are needed.

    Raises:
        SystemExit: Naming the missing folder and what to put there.
    """
    for dataset in _datasets(cfg, loaders):
        for path in _data_paths(dataset):
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                continue
            state = 'is empty' if path.is_dir() else 'does not exist'
            kind = dataset.get('type', 'dataset')
            message = (
                f'{kind}: {path} {state}.\n'
                f'{_DATASET_HELP.get(kind, "Put the dataset there.")}\n'
                f'Elsewhere on disk? Add --cfg-options '
                f'data_root=/path/to/it (now {dataset.data_root or "."}).'
            )
            if cfg.get('default_scope') == 'mmseg':
                message += f'\n{_DATASET_FALLBACK}'
            raise SystemExit(message)
        _check_suffix(dataset)


def _check_suffix(dataset: ConfigDict) -> None:
    """Stop if an image folder of mmseg's holds files of another kind only."""
    prefix = dataset.get('data_prefix') or {}
    cls = DATASETS.get(str(dataset.get('type')))
    if not isinstance(prefix, dict) or 'img_path' not in prefix or not cls:
        return
    default = inspect.signature(cls).parameters.get('img_suffix')
    suffix = dataset.get('img_suffix', default and default.default)
    folder = Path(dataset.data_root or '.') / prefix['img_path']
    if not isinstance(suffix, str) or not folder.is_dir():
        return
    if not any(folder.rglob(f'*{suffix}')):
        raise SystemExit(
            f'{dataset.type}: {folder} has no file ending in {suffix}, the '
            'dataset is empty; put images of that kind there, or set '
            'img_suffix of the dataset to theirs'
        )


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


def is_first_process() -> bool:
    """Whether this is the first process of a distributed run, or alone."""
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return not any(int(os.environ.get(name, 0)) for name in names)


#: What watches over a run of the tools.
_TRAIN_GUARDS = ('RunGuardHook', 'InterruptHook')


def guard_run(cfg: Config, hooks: tuple[str, ...] = _TRAIN_GUARDS) -> None:
    """Add hooks that stop and save cleanly; save checkpoints whole."""
    given = list(cfg.get('custom_hooks') or [])
    present = {hook.get('type') for hook in given}
    given += [dict(type=hook) for hook in hooks if hook not in present]
    cfg.custom_hooks = given
    saving = (cfg.get('default_hooks') or {}).get('checkpoint')
    if saving and saving.get('type') == 'CheckpointHook':
        saving.type = 'WholeCheckpointHook'


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
    init_cfg = (model.get('backbone') or {}).get('init_cfg')
    if isinstance(init_cfg, dict) and init_cfg.get('checkpoint'):
        init_cfg.checkpoint = fetch_checkpoint(init_cfg.checkpoint)


def ensure_compression_hook(cfg: Config) -> None:
    """Add ``PruneMergeHook`` to a config that compresses without it."""

    def compresses(node: object) -> bool:
        if not isinstance(node, dict):
            return False
        options = node.get('compression')
        if options and options.get('type', 'prune_merge') == 'prune_merge':
            return True
        return any(map(compresses, node.values()))

    hooks = list(cfg.get('custom_hooks') or [])
    if compresses(cfg.model) and not any(
        hook['type'] == 'PruneMergeHook' for hook in hooks
    ):
        cfg.custom_hooks = [*hooks, dict(type='PruneMergeHook')]
