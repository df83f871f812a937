"""timm's and DeiT's classifiers as mmpretrain's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..utils.checkpoints import CheckpointError
from .keys import ARCHS, Geometry, read_geometry, rename, shape_of
from .results import Converted, normalization
from .sources import Hints

_WHAT = 'timm Vision Transformer'
_NAMES = (
    ('head.layers.pre_logits', 'pre_logits.fc'),
    ('head.layers.', ''),
    ('head.fc', 'head'),
    ('backbone.ln1', 'norm'),
    ('backbone.ln2', 'fc_norm'),
    ('backbone.', ''),
)
# What masked autoencoders are pre-trained with besides the encoder.
_IGNORED = ('decoder_', 'mask_token')


def convert_timm(state: dict[str, Tensor], hints: Hints) -> Converted:
    """Classifier of timm, DeiT or MAE -> mmpretrain's ``ImageClassifier``.

    Distilled ones, pooling by average (``fc_norm``), layer scale, the hidden
    layer of ImageNet-21k heads and checkpoints without a head are supported.

    Args:
        state (dict[str, Tensor]): With timm's names.
        hints (Hints): Number of heads, image size and normalization; found
            in the shapes and the file name where None.

    Raises:
        CheckpointError: If it is something else or incomplete.
    """
    if find_spec('mmpretrain') is None:
        raise CheckpointError(
            'classifiers need the mmpretrain package, which is not '
            'installed: pip install -r requirements/mminstall.txt'
        )
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    geometry = read_geometry(state, hints, _WHAT)
    pixels, note = _normalization(hints, geometry.num_prefix == 2)
    notes = [note]
    if not geometry.embeds_prefix:
        padding = (0, 0, geometry.num_prefix, 0)
        state = {**state, 'pos_embed': F.pad(state['pos_embed'], padding)}
        height, width = geometry.img_size
        notes.append(
            f'positions are taken for patches alone, images of {height}x'
            f'{width}; give --img-size if that is wrong'
        )
    head = _head(state, geometry)
    preprocessor, meta = dict(**pixels, to_rgb=True), {}
    if head is None:
        notes.append('no classification head: model.head is None')
    else:
        preprocessor['num_classes'] = head['num_classes']
        if head['num_classes'] == len(IMAGENET_CATEGORIES):
            meta = dict(classes=tuple(IMAGENET_CATEGORIES))
    model = dict(
        type='ImageClassifier',
        data_preprocessor=preprocessor,
        backbone=_backbone(state, geometry),
        head=head,
    )
    renamed = rename(state, model, 'mmpretrain', _NAMES, _WHAT, _IGNORED)
    return Converted(renamed, model, 'mmpretrain', geometry, meta, notes)


def _backbone(state: dict[str, Tensor], geometry: Geometry) -> dict[str, Any]:
    sizes = geometry.embed_dims, geometry.num_layers, geometry.hidden_dims
    arch, heads = ARCHS.get(sizes, ('', 0))
    if heads != geometry.num_heads:
        arch = dict(
            embed_dims=geometry.embed_dims,
            num_layers=geometry.num_layers,
            num_heads=geometry.num_heads,
            feedforward_channels=geometry.hidden_dims,
        )
    distilled = 'Distilled' if geometry.num_prefix == 2 else ''
    backbone = dict(
        type=f'PM{distilled}VisionTransformer',
        arch=arch,
        img_size=geometry.img_size,
        patch_size=geometry.patch_size,
        in_channels=geometry.in_channels,
        qkv_bias='blocks.0.attn.qkv.bias' in state,
        norm_cfg=dict(type='LN', eps=1e-6),
    )
    if 'fc_norm.weight' in state:
        backbone.update(out_type='avg_featmap', final_norm=False)
    if 'blocks.0.ls1.gamma' in state:
        backbone.update(layer_scale_init_value=1e-5)
    if 'patch_embed.proj.bias' not in state:
        backbone.update(patch_cfg=dict(bias=False))
    return backbone


def _head(
    state: dict[str, Tensor], geometry: Geometry
) -> dict[str, Any] | None:
    """Config of the head; a bias or a second layer alone makes none."""
    if 'head.weight' not in state:
        return None
    kind, hidden = 'VisionTransformerClsHead', 'pre_logits.fc.weight'
    if geometry.num_prefix == 2:
        kind = 'DeiTClsHead'
    if 'fc_norm.weight' in state:
        kind = 'LinearClsHead'
    head = dict(
        type=kind,
        num_classes=shape_of(state, 'head.weight', 2, _WHAT)[0],
        in_channels=geometry.embed_dims,
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
        ),
    )
    if hidden in state and kind != 'LinearClsHead':
        head['hidden_dim'] = shape_of(state, hidden, 2, _WHAT)[0]
    return head


def _normalization(
    hints: Hints, distilled: bool
) -> tuple[dict[str, list[float]], str]:
    """What is given, in timm's config.json, or usual: ImageNet's for DeiT and
    MAE, 0.5 for timm's ViT; and a note on it."""
    if hints.pretrained_cfg and hints.normalization is None:
        pixels = {
            key: [255 * value for value in values]
            for key, values in hints.pretrained_cfg.items()
        }
        return pixels, 'pixel mean and std: from config.json'
    name = hints.name.lower()
    known = distilled or 'deit' in name or 'mae' in name
    return normalization(hints.normalization, 'imagenet' if known else 'vit')
