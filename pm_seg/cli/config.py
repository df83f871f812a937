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
from mmengine.utils import scandir

from ..stacks import installed_stacks
from ..utils.checkpoints import trusted
from .checkpoint import fetch_checkpoint
from .data import datasets
from .ending import PACKAGE


def resolve_config(name: str) -> str:
    """Path of a config: a file, or one of ours by its name, with or without
    ``configs/`` in front and ``.py`` behind; stops if there is none."""
    if Path(name).is_file():
        return name
    folder = PACKAGE / '.mim' / 'configs'  # of an installed copy
    if not folder.is_dir():
        folder = PACKAGE.parent / 'configs'
    relative = name.removeprefix('./').removeprefix('configs/')
    config = folder / f'{relative.removesuffix(".py")}.py'
    if config.is_file():
        return str(config)
    names = scandir(folder, '.py', recursive=True)
    names = sorted(name for name in names if '_base_' not in name)
    raise SystemExit(
        f'Config not found: {name}\nThe configs of pm_seg are:\n  '
        + '\n  '.join(names)
    )


class _SafeYaml(YamlHandler):
    """YAML that is data; mmengine's own would build any Python object."""

    def load_from_fileobj(self, file, **kwargs) -> object:
        return yaml.safe_load(file)


def check_environment() -> None:
    """Refuse mixed installations; let torch load weights alone from now on."""
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
    options, old_root = args.cfg_options or {}, cfg.get('data_root')
    cfg.merge_from_dict(options)
    if 'data_root' in options:
        for dataset in datasets(cfg, 'train', 'val', 'test'):
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
