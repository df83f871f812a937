"""The Segmenter repository's models (Strudel et al., arXiv 2105.05633)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..utils.checkpoints import CheckpointError
from .keys import Geometry, count_blocks, read_geometry, rename, shape_of
from .results import Converted, normalization
from .sources import Hints, number, pair

_WHAT = 'Segmenter'
_NAMES = (
    ('backbone.ln1', 'encoder.norm'),
    ('backbone.', 'encoder.'),
    ('decode_head.', 'decoder.'),
    ('conv_seg', 'head'),
    ('dec_proj', 'proj_dec'),
    ('patch_proj.weight', 'proj_patch'),
    ('classes_proj.weight', 'proj_classes'),
)
# The classifier the encoder was pre-trained with.
_IGNORED = ('encoder.head.', 'encoder.head_dist.')
# Unlike timm's, its layer normalisations have PyTorch's default epsilon.
_NORM = dict(type='LN', eps=1e-5)
_NORMALIZATIONS = {'vit': 'vit', 'deit': 'imagenet'}
_DATASETS = {
    'ade20k': 'ADE20KDataset',
    'cityscapes': 'CityscapesDataset',
    'pascal_context': 'PascalContextDataset',
}


def convert_segmenter(state: dict[str, Tensor], hints: Hints) -> Converted:
    """Segmenter checkpoint -> mmseg's ``EncoderDecoder``.

    Both decoders are supported, the mask transformer and the linear one.

    Args:
        state (dict[str, Tensor]): ``encoder.*`` and ``decoder.*``.
        hints (Hints): ``variant`` tells heads, image size, sliding window,
            normalization and dataset.

    Raises:
        CheckpointError: If it is something else, incomplete, contradicts its
            variant.yml, or has a distillation token.
    """
    encoder, decoder = _below(state, 'encoder.'), _below(state, 'decoder.')
    if not encoder:
        shape_of(state, 'cls_token', 3, _WHAT)  # says what it is instead
        raise CheckpointError(
            'this is a classifier, expected encoder.* and decoder.*; use the '
            "kind 'timm'"
        )
    if 'dist_token' in encoder:
        raise CheckpointError(
            'the encoder has a distillation token (a DeiT backbone), for '
            'which mmseg has no Vision Transformer; convert a Segmenter with '
            'a plain ViT backbone'
        )
    net = _section(hints.variant, 'net_kwargs')
    data = _section(hints.variant, 'dataset_kwargs')
    windows = _section(hints.variant, 'inference_kwargs')
    hints = hints.completed(net, 'n_heads', 'image_size')
    geometry = read_geometry(encoder, hints, _WHAT)
    _check_variant(net, 'n_layers', geometry.num_layers)
    _check_variant(net, 'd_model', geometry.embed_dims)
    _check_variant(net, 'patch_size', geometry.patch_size)
    head = _head(decoder, geometry, _section(net, 'decoder'))
    written = str(data.get('normalization', net.get('normalization')))
    known = hints.normalization or _NORMALIZATIONS.get(written)
    pixels, note = normalization(known)
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            **pixels,
            bgr_to_rgb=True,
            pad_val=0,
            seg_pad_val=255,
            size=geometry.img_size,
        ),
        backbone=dict(
            type='PMVisionTransformer',
            img_size=geometry.img_size,
            patch_size=geometry.patch_size,
            in_channels=geometry.in_channels,
            embed_dims=geometry.embed_dims,
            num_layers=geometry.num_layers,
            num_heads=geometry.num_heads,
            mlp_ratio=geometry.hidden_dims // geometry.embed_dims,
            drop_path_rate=number(net, 'drop_path_rate', 0.1),
            final_norm=True,
            norm_cfg=dict(_NORM),
            with_cls_token=True,
            interpolate_mode='bilinear',
        ),
        decode_head=dict(
            **head,
            dropout_ratio=0.0,
            align_corners=False,
            loss_decode=dict(
                type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0
            ),
        ),
        train_cfg=dict(),
        test_cfg=dict(  # as in the repository's evaluation
            mode='slide',
            crop_size=pair(windows.get('window_size') or geometry.img_size),
            stride=pair(windows.get('window_stride') or geometry.img_size),
        ),
    )
    renamed = _renamed(state, model)
    meta = _dataset_meta(data.get('dataset'), head['num_classes'])
    return Converted(renamed, model, 'mmseg', geometry, meta, [note])


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def _section(description: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = description.get(name)
    return section if isinstance(section, dict) else {}


def _check_variant(section: Mapping[str, Any], name: str, actual: int) -> None:
    if number(section, name, actual) != actual:
        raise CheckpointError(
            f'variant.yml says {name}={section[name]}, the weights have '
            f'{actual}; it belongs to another checkpoint (move it away) or '
            'the checkpoint is incomplete'
        )


def _head(
    decoder: dict[str, Tensor], geometry: Geometry, given: dict[str, Any]
) -> dict[str, Any]:
    """The decoder; ``given`` is what variant.yml says of it."""
    if 'head.weight' in decoder:  # the linear one
        classes = shape_of(decoder, 'head.weight', 2, 'linear decoder')[0]
        return dict(
            type='FCNHead',
            in_channels=geometry.embed_dims,
            channels=geometry.embed_dims,
            num_convs=0,
            kernel_size=1,
            concat_input=False,
            num_classes=classes,
        )
    if 'cls_emb' not in decoder:
        raise CheckpointError(
            'the decoder is no mask transformer and no linear one: expected '
            'decoder.cls_emb or decoder.head.weight, got '
            f'{", ".join(list(decoder)[:4]) or "no decoder.*"}; other '
            'decoders cannot be converted, an incomplete file must be copied '
            'again'
        )
    what = 'mask transformer'
    dims = shape_of(decoder, 'proj_dec.weight', 2, what)[0]
    hidden = shape_of(decoder, 'blocks.0.mlp.fc1.weight', 2, what)[0]
    depth = count_blocks(decoder)
    _check_variant(given, 'n_layers', depth)
    return dict(
        type='PMSegmenterMaskTransformerHead',
        in_channels=geometry.embed_dims,
        channels=dims,
        num_layers=depth,
        # The repository gives both parts heads of the same size.
        num_heads=dims * geometry.num_heads // geometry.embed_dims,
        embed_dims=dims,
        mlp_ratio=hidden // dims,
        drop_path_rate=number(given, 'drop_path_rate', 0.0),
        norm_cfg=dict(_NORM),
        num_classes=shape_of(decoder, 'cls_emb', 3, what)[1],
    )


def _renamed(
    state: dict[str, Tensor], model: dict[str, Any]
) -> dict[str, Tensor]:
    """Our names, and what differs by more than its name."""
    state = dict(state)
    if 'decoder.head.weight' in state:
        weight = state['decoder.head.weight']
        state['decoder.head.weight'] = weight[:, :, None, None]
    if 'encoder.blocks.0.attn.qkv.bias' not in state:  # tied to others
        for key in [k for k in state if k.endswith('qkv.weight')]:
            bias = torch.zeros(len(state[key]))
            state[key.replace('weight', 'bias')] = bias
    renamed = rename(state, model, 'mmseg', _NAMES, _WHAT, _IGNORED)
    for name in ('patch_proj', 'classes_proj'):
        key = f'decode_head.{name}.weight'
        if key in renamed:  # multiplied from the right there
            renamed[key] = renamed[key].T.contiguous()
    return renamed


def _dataset_meta(name: Any, num_classes: int) -> dict[str, Any]:
    """Names and colours of the classes; numbers where they are unknown."""
    from mmseg.registry import DATASETS

    if isinstance(name, str) and name in _DATASETS:
        meta = DATASETS.get(_DATASETS[name]).METAINFO
        if len(meta['classes']) == num_classes:
            return {key: meta[key] for key in ('classes', 'palette')}
    return dict(
        classes=tuple(f'class {index}' for index in range(num_classes)),
        palette=[
            [(step * (index + 1)) % 256 for step in (67, 131, 199)]
            for index in range(num_classes)
        ],
    )
