"""The models that a benchmark compares: the same weights, equal layer cost."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.utils import to_2tuple
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

    All have the same weights: those of ``state`` or random ones. The method
    that the config names has all of the config's options, and what a
    compressed checkpoint says; the others have their defaults.

    Args:
        cfg (Config): With a compression in the backbone.
        size (tuple[int, int]): Height and width of the images, any. Position
            embeddings are resized to it.
        methods (Sequence[str]): Keys of ``METHODS``. Defaults to all.
        keep (float, optional): Share of the MACs of the layers. Defaults to
            what the checkpoint was compressed to, else the config's.
        state (dict, optional): State dict of a dense or compressed
            checkpoint.

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
    kind = own.get('type', 'pm')
    patch = patch_size(cfg)
    native, grid = patch_grid(cfg, patch), patch_grid(cfg, patch, size)
    size = grid[0] * patch[0], grid[1] * patch[1]
    if not MMLogger.check_instance_created('pm_seg'):
        # No line for each weight, nor for each time a checkpoint is loaded.
        MMLogger.get_instance('pm_seg', log_level='ERROR')
    torch.manual_seed(0)
    dense = MODELS.build(_model_config(cfg, size, None))
    if state is None:
        dense.init_weights()
        state = dense.state_dict()
    weights = {k: v for k, v in state.items() if '.compressor.' not in k}
    if _POSITIONS in weights:
        weights[_POSITIONS] = fit_positions(
            weights[_POSITIONS],
            dense.backbone.pos_embed.shape[1],
            native,
            grid,
        )
    dense.load_state_dict(weights)
    reference = _reference(cfg, size, own, state, weights)
    compressor = reference.backbone.compressor
    if keep is not None or not compressor.has_structure:
        _meet(compressor, keep or compressor.keep or 0.5)
    keep = keep or compressor.keep or round(compressor.share, 4)
    models, missing = {DENSE: dense}, {}
    for name in methods:
        if METHODS[name] == kind:
            models[name] = reference
            continue
        peer = dict(type=METHODS[name])
        if name != 'paper':
            peer['keep'] = 1.0  # its default may be out of reach
        model = MODELS.build(_model_config(cfg, size, peer))
        model.load_state_dict(weights)
        try:
            _meet(model.backbone.compressor, keep)
        except ValueError as error:
            missing[name] = str(error)
        else:
            models[name] = model
    return models, missing


def patch_size(cfg: Config) -> tuple[int, int]:
    """Height and width of a patch; timm's models know it once built."""
    backbone = cfg.model.backbone
    if 'model_name' in backbone:
        backbone = {**backbone, 'compression': None}
        return to_2tuple(MODELS.build(backbone).patch_size)
    return to_2tuple(backbone.get('patch_size', 16))


def image_size(cfg: Config) -> tuple[int, int]:
    """Height and width that a config's model is built for."""
    return tuple(to_2tuple(cfg.model.backbone.get('img_size', 224)))


def patch_grid(
    cfg: Config, patch: tuple[int, int], size: Sequence[int] | None = None
) -> Grid:
    """Patch rows and columns, begun ones too; of the config's size if None."""
    size = to_2tuple(size or image_size(cfg))
    return -(-size[0] // patch[0]), -(-size[1] // patch[1])


def fit_positions(
    positions: Tensor, length: int, native: Grid, grid: Grid
) -> Tensor:
    """Position embeddings of one grid for another, bicubic.

    Args:
        positions (Tensor): (1, P + tokens, C).
        length (int): P + h * w, of the other grid.
        native (tuple[int, int]): Grid they are of; a square one if they are
            of another number of tokens.
        grid (tuple[int, int]): h and w.

    Returns:
        Tensor: (1, P + h * w, C).
    """
    prefix = length - grid[0] * grid[1]
    tokens = positions.shape[1] - prefix
    if native[0] * native[1] != tokens:
        native = (round(tokens**0.5),) * 2
    if native == grid or native[0] * native[1] != tokens:
        return positions  # loading says what does not fit
    first, rest = positions.split([prefix, tokens], dim=1)
    rest = rest.transpose(1, 2).unflatten(2, native)
    rest = F.interpolate(rest, grid, mode='bicubic', align_corners=False)
    return torch.cat([first, rest.flatten(2).transpose(1, 2)], 1)


def _model_config(
    cfg: Config, size: tuple[int, int], compression: dict | None
) -> dict:
    """For another image size, without teacher and pretrained weights."""
    model = copy.deepcopy(cfg.model)
    model.backbone.img_size = size
    model.backbone.compression = copy.deepcopy(compression)
    for source in ('init_cfg', 'pretrained'):
        model.backbone.pop(source, None)
    model.pop('pretrained', None)
    if 'teacher' in model:
        model.teacher = None
    return model


def _reference(
    cfg: Config,
    size: tuple[int, int],
    own: dict,
    state: State,
    weights: State,
) -> nn.Module:
    """The config's own compression, with what a checkpoint says of it.

    Groups by position belong to a grid: such a model keeps its native size
    and derives those of another one when it runs.
    """
    measured = {k: v for k, v in state.items() if '.compressor.' in k}
    native = image_size(cfg)
    positional = any(k.endswith('.compressor.group') for k in measured)
    built = native if positional else size
    model = MODELS.build(_model_config(cfg, built, own))
    if built == size:
        model.load_state_dict({**weights, **measured})
        return model
    model.load_state_dict(state)
    if _POSITIONS in weights:
        model.backbone.pos_embed = nn.Parameter(weights[_POSITIONS].clone())
    return model


def _meet(compressor: Compressor, keep: float) -> None:
    """Set the cost of the layers; scores, where there are none, at random."""
    if compressor.needs_scores and not compressor.has_scores:
        scores = torch.rand(compressor.scores.shape) + 0.1
        compressor.store(scores)
    compressor.set_keep(keep)
