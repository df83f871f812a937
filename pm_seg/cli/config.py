"""Configs that a command names, and the models they describe."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

import yaml
from mmengine.config import Config
from mmengine.fileio import YamlHandler, register_handler
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from ..stacks import installed_stacks
from ..utils.checkpoints import trusted
from .checkpoint import fetch_checkpoint
from .data import datasets

PACKAGE = Path(__file__).resolve().parents[1]


def resolve_config(name: str) -> str:
    """Path of a config given as a path or as the name of one of ours.

    Args:
        name (str): An existing file, or one of the package's configs with or
            without ``configs/`` in front and ``.py`` behind.

    Raises:
        SystemExit: If there is no such config; lists those there are.
    """
    if Path(name).is_file():
        return name
    folder = PACKAGE / '.mim' / 'configs'  # of an installed copy
    if not folder.is_dir():
        folder = PACKAGE.parent / 'configs'
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
    """Read the config, apply ``--cfg-options`` and enter its scope."""
    check_environment()
    cfg = Config.fromfile(resolve_config(args.config))
    options = args.cfg_options or {}
    old_root = cfg.get('data_root')
    cfg.merge_from_dict(options)
    if 'data_root' in options:
        for dataset in datasets(cfg):
            if old_root in (None, dataset.get('data_root')):
                dataset.data_root = options['data_root']
    if cfg.get('data_preprocessor'):  # where mmpretrain's configs have it
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    return cfg


def load_model(
    model_cfg: dict, checkpoint: str, device: str = 'cpu'
) -> tuple[BaseModel, dict]:
    """Build a model and load its weights; also returns the checkpoint."""
    model = MODELS.build(model_cfg)
    path = fetch_checkpoint(checkpoint)
    saved = load_checkpoint(model, path, map_location='cpu')
    return model.to(device), saved
