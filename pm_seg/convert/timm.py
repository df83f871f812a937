"""timm's and DeiT's classifiers as mmpretrain's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .keys import (
    ARCHS,
    Geometry,
    Hints,
    Renaming,
    blocks,
    embeddings,
    linear,
    norm,
    read_geometry,
    rename,
    shape_of,
)
from .results import NORMALIZATIONS, Converted

_WHAT = 'timm Vision Transformer'
# What masked autoencoders are pre-trained with besides the encoder.
_IGNORED = ('decoder_', 'mask_token')
_IMAGENET_CLASSES = 1000


def convert_timm(state: dict[str, Tensor], hints: Hints) -> Converted:
    """Classifier of timm, DeiT or MAE -> mmpretrain's ``ImageClassifier``.

    Distilled ones, pooling by average (``fc_norm``), layer scale, the hidden
    layer of ImageNet-21k heads and checkpoints without a head are supported.

    Args:
        state (dict[str, Tensor]): With timm's names.
        hints (Hints): Number of heads, image size and normalization; found
            in the shapes and the file name where None.

    Raises:
        ConversionError: If it is something else or incomplete.
    """
    geometry = read_geometry(state, hints, _WHAT, patch_positions=True)
    dims, depth = geometry.embed_dims, geometry.num_layers
    pooled = 'fc_norm.weight' in state
    scaled = 'blocks.0.ls1.gamma' in state
    patch_bias = 'patch_embed.proj.bias' in state
    table = list(embeddings(geometry, patch_bias))
    table += blocks(
        depth, dims, geometry.hidden_dims, geometry.qkv_bias, mmseg=False
    )
    if scaled:
        for layer in range(depth):
            for old, new in (('ls1', 'attn.gamma1'), ('ls2', 'ffn.gamma2')):
                table.append(
                    Renaming(
                        f'blocks.{layer}.{old}.gamma',
                        f'layers.{layer}.{new}.weight',
                        (dims,),
                    )
                )
    table += (
        norm('fc_norm', 'ln2', dims) if pooled else norm('norm', 'ln1', dims)
    )
    table = [Renaming(old, f'backbone.{new}', s) for old, new, s in table]
    head, entries = _head(state, geometry, pooled)
    renamed = rename(state, [*table, *entries], _WHAT, _IGNORED)
    if not geometry.embeds_prefix:
        positions = renamed['backbone.pos_embed']
        padding = (0, 0, geometry.num_prefix, 0)
        renamed['backbone.pos_embed'] = F.pad(positions, padding)

    distilled = geometry.num_prefix == 2
    backbone: dict[str, Any] = dict(
        type='PMDistilledVisionTransformer'
        if distilled
        else 'PMVisionTransformer',
        arch=_arch(geometry),
        img_size=geometry.img_size,
        patch_size=geometry.patch_size,
        in_channels=geometry.in_channels,
        qkv_bias=geometry.qkv_bias,
        norm_cfg=dict(type='LN', eps=1e-6),
    )
    if pooled:
        backbone.update(out_type='avg_featmap', final_norm=False)
    if scaled:
        backbone.update(layer_scale_init_value=1e-5)
    if not patch_bias:
        backbone.update(patch_cfg=dict(bias=False))
    mean, std, note = _normalization(hints, distilled)
    notes = [note]
    if not geometry.embeds_prefix:
        height, width = geometry.img_size
        notes.append(
            f'positions are taken for patches alone, images of {height}x'
            f'{width}; give --img-size if that is wrong'
        )
    if head is None:
        notes.append('no classification head: model.head is None')
    classes = head['num_classes'] if head else None
    preprocessor = dict(mean=mean, std=std, to_rgb=True)
    if classes:
        preprocessor = dict(num_classes=classes, **preprocessor)
    return Converted(
        state_dict=renamed,
        model=dict(
            type='ImageClassifier',
            data_preprocessor=preprocessor,
            backbone=backbone,
            head=head,
        ),
        scope='mmpretrain',
        dataset_meta=_imagenet_meta(classes),
        notes=notes,
    )


def _head(
    state: dict[str, Tensor], geometry: Geometry, pooled: bool
) -> tuple[dict[str, Any] | None, list[Renaming]]:
    """Config and entries of the head; (None, []) if there is none."""
    dims = geometry.embed_dims
    if 'head.weight' not in state:
        # A bias or a second layer alone is reported as unexpected.
        return None, []
    classes = shape_of(state, 'head.weight', 2, _WHAT)[0]
    cfg = dict(num_classes=classes, in_channels=dims)
    cfg['loss'] = dict(
        type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
    )
    if pooled:
        entries = linear('head', 'head.fc', classes, dims)
        return dict(type='LinearClsHead', **cfg), list(entries)
    entries = []
    if 'pre_logits.fc.weight' in state:
        key = 'pre_logits.fc.weight'
        cfg['hidden_dim'] = shape_of(state, key, 2, _WHAT)[0]
        entries += linear(
            'pre_logits.fc', 'head.layers.pre_logits', cfg['hidden_dim'], dims
        )
        dims = cfg['hidden_dim']
    entries += linear('head', 'head.layers.head', classes, dims)
    if geometry.num_prefix == 1:
        return dict(type='VisionTransformerClsHead', **cfg), entries
    entries += linear('head_dist', 'head.layers.head_dist', classes, dims)
    return dict(type='DeiTClsHead', **cfg), entries


def _arch(geometry: Geometry) -> str | dict[str, int]:
    """mmpretrain's name of the architecture, or its sizes."""
    sizes = (geometry.embed_dims, geometry.num_layers, geometry.hidden_dims)
    name, heads = ARCHS.get(sizes, ('', 0))
    if heads == geometry.num_heads:
        return name
    return dict(
        embed_dims=geometry.embed_dims,
        num_layers=geometry.num_layers,
        num_heads=geometry.num_heads,
        feedforward_channels=geometry.hidden_dims,
    )


def _normalization(
    hints: Hints, distilled: bool
) -> tuple[list[float], list[float], str]:
    """Pixel mean and deviation, and a note on where they come from.

    Weights do not say: in this order, what is given, what timm's config.json
    says, ImageNet's for DeiT and MAE, else 0.5 as in timm's ViT.
    """
    cfg = hints.pretrained_cfg
    if hints.normalization is None and {'mean', 'std'} <= cfg.keys():
        mean, std = ([255 * v for v in cfg[key]] for key in ('mean', 'std'))
        return mean, std, 'pixel mean and std: from config.json'
    name = hints.normalization
    if name is None:
        known = distilled or any(
            word in hints.name.lower() for word in ('deit', 'mae')
        )
        name = 'imagenet' if known else 'vit'
        reason = ' (a guess; change it with --normalization)'
    else:
        reason = ''
    mean, std = (list(values) for values in NORMALIZATIONS[name])
    return mean, std, f'pixel mean {mean} and std {std}{reason}'


def _imagenet_meta(num_classes: int | None) -> dict[str, Any]:
    if num_classes != _IMAGENET_CLASSES or find_spec('mmpretrain') is None:
        return {}
    from mmpretrain.datasets.categories import IMAGENET_CATEGORIES

    return dict(classes=tuple(IMAGENET_CATEGORIES))
