"""What a conversion gives, and writing it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from ..utils.files import whole_files
from ..version import __version__
from .keys import Geometry

#: Pixel mean and standard deviation, RGB.
NORMALIZATIONS = {
    'vit': ([127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),
    'imagenet': ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
}


def normalization(
    name: str | None, guess: str = 'vit'
) -> tuple[dict[str, list[float]], str]:
    """Pixel ``mean`` and ``std`` by their name, and a note that says them."""
    mean, std = map(list, NORMALIZATIONS[name or guess])
    reason = '' if name else ' (a guess; change it with --normalization)'
    return dict(mean=mean, std=std), f'pixel mean {mean} and std {std}{reason}'


@dataclass(frozen=True)
class Converted:
    """A checkpoint and the config that loads it."""

    state_dict: dict[str, Tensor]
    model: dict[str, Any]  # config of what has these weights
    scope: str  # the default one, 'mmseg' or 'mmpretrain'
    geometry: Geometry  # of the backbone
    dataset_meta: dict[str, Any]  # names of the classes, where known
    notes: list[str]  # what a user should know


def write_converted(
    converted: Converted, out: str | Path, origin: str
) -> Path:
    """Write a checkpoint, *.pth, and beside it the config, or neither.

    Returns:
        Path: The config.
    """
    config = Config(
        dict(
            custom_imports=dict(imports=['pm_seg']),
            default_scope=converted.scope,
            data_preprocessor=converted.model['data_preprocessor'],
            model=converted.model,
        )
    )
    text = f'# Converted by pm_seg from {origin}.\n{config.pretty_text}'
    meta = dict(cfg=text, converted_from=origin, pm_seg_version=__version__)
    if converted.dataset_meta:
        meta['dataset_meta'] = converted.dataset_meta
    files = Path(out).with_suffix('.py'), Path(out)
    with whole_files(*files) as (config_file, checkpoint):
        config_file.write_text(text)
        content = dict(state_dict=converted.state_dict, meta=meta)
        torch.save(content, checkpoint)
    return files[0]
