"""The models that a benchmark compares: the same weights, equal layer cost."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.utils import to_2tuple
from mmseg.models.backbones import VisionTransformer
from torch import Tensor, nn

from ..core import Compressor
from ..core.merging import Grid

DENSE = 'dense'
#: What rows are called, and the type of their compression.
METHODS = {
    'ours': 'pm',
    'ToMe-style': 'tome',
    'ALGM-style': 'algm',
    'paper': 'paper',
}
_POSITIONS = 'backbone.pos_embed'

State = dict[str, Tensor]


def build_models(
    cfg: Config,
    size: tuple[int, int],
    methods: Sequence[str] = tuple(METHODS),
    keep: float | None = None,
    state: State | None = None,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The dense model, and each method at the same cost of the layers.

    All have the same weights: those of ``state``, dense or compressed, or
    random ones, with position embeddings for images of any ``size``. The
    method that the config names has all of the config's options, and what a
    compressed checkpoint says; the others have their defaults. ``keep``
    defaults to what the checkpoint was compressed to, else the config's.

    Returns:
        tuple[dict[str, nn.Module], dict[str, str]]: Models by name, 'dense'
        first; and why methods are missing that cannot reach the budget.

    Raises:
        ValueError: If the config has no compression, or its own cannot reach
            the budget.
        RuntimeError: If the checkpoint does not fit the config.
    """
    own = cfg.model.backbone.get('compression')
    if own is None:
        raise ValueError(
            'the config has no compression; give it one of ours, or '
            '--cfg-options model.backbone.compression.keep=0.5 to a config '
            "with type='PMVisionTransformer'"
        )
    if not MMLogger.check_instance_created('pm_seg'):
        # No line for each weight, nor for each time a checkpoint is loaded.
        MMLogger.get_instance('pm_seg', log_level='ERROR')
    patch = _patch_size(cfg)
    grid, native_grid = (
        tuple(-(-side // step) for side, step in zip(sides, patch))
        for sides in (size, image_size(cfg))
    )
    torch.manual_seed(0)
    dense = _build_dense(cfg, (grid[0] * patch[0], grid[1] * patch[1]))
    if state is None:
        dense.init_weights()
        state = dense.state_dict()
    weights = {k: v for k, v in state.items() if '.compressor.' not in k}
    vit, positions = dense.backbone, weights.get(_POSITIONS)
    if (
        grid != native_grid
        and isinstance(vit, VisionTransformer)  # others do it when they load
        and positions is not None
        and positions.shape != vit.pos_embed.shape
    ):
        weights[_POSITIONS] = vit.resize_pos_embed(
            positions, grid, native_grid, 'bicubic'
        )
    dense.load_state_dict(weights)
    # Groups by position are of the native grid, and give those of others.
    positional = any(key.endswith('.compressor.group') for key in state)
    reference = _compressed(dense, own, native_grid if positional else grid)
    reference.load_state_dict({**state, **weights})
    compressor = reference.backbone.compressor
    if keep is not None or not compressor.has_structure:
        _meet(compressor, keep or compressor.keep or 0.5)
    keep = keep or compressor.keep or round(compressor.share, 4)
    models, missing = {DENSE: dense}, {}
    for name in methods:
        if METHODS[name] == own.get('type', 'pm'):
            models[name] = reference
            continue
        options = dict(type=METHODS[name])
        if name != 'paper':
            options['keep'] = 1.0  # the default may be out of reach
        model = _compressed(dense, options, grid)
        try:
            _meet(model.backbone.compressor, keep)
        except ValueError as error:
            missing[name] = str(error)
        else:
            models[name] = model
    return models, missing


def _patch_size(cfg: Config) -> tuple[int, int]:
    """Height and width of a patch; timm's models know it once built."""
    backbone = cfg.model.backbone
    if 'model_name' in backbone:
        backbone = {**backbone, 'compression': None}
        return to_2tuple(MODELS.build(backbone).patch_size)
    return to_2tuple(backbone.get('patch_size', 16))


def image_size(cfg: Config) -> tuple[int, int]:
    """Height and width that a config's model is built for."""
    return tuple(to_2tuple(cfg.model.backbone.get('img_size', 224)))


def _build_dense(cfg: Config, size: tuple[int, int]) -> nn.Module:
    """For an image size, without teacher and pretrained weights."""
    model = copy.deepcopy(cfg.model)
    model.backbone.update(img_size=size, compression=None)
    for name in ('pretrained', 'teacher'):
        model.pop(name, None)
    for name in ('pretrained', 'init_cfg'):
        model.backbone.pop(name, None)
    return MODELS.build(model)


def _compressed(dense: nn.Module, options: dict, grid: Grid) -> nn.Module:
    """A copy with a compression for a grid of patches."""
    model = copy.deepcopy(dense)
    model.backbone.build_compressor(options, grid)
    return model


def _meet(compressor: Compressor, keep: float) -> None:
    """Set the cost of the layers; scores, where there are none, at random."""
    if compressor.needs_scores and not compressor.has_scores:
        compressor.store(torch.rand(compressor.scores.shape) + 0.1)
    compressor.set_keep(keep)
