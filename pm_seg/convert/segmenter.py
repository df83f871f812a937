"""The Segmenter repository's models (Strudel et al., arXiv 2105.05633)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .hints import Hints, number, pair
from .keys import (
    Geometry,
    count_blocks,
    part,
    read_geometry,
    rename,
    shape_of,
)
from .results import Converted, normalization
from .sources import ConversionError

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
        ConversionError: If it is something else, incomplete, contradicts its
            variant.yml, or has a distillation token.
    """
    encoder, decoder = part(state, 'encoder.'), part(state, 'decoder.')
    if not encoder:
        # What it is instead is found out, and said, here.
        read_geometry(state, Hints(), _WHAT + ' (encoder.*, decoder.*)')
        raise ConversionError(
            'this is a classifier, expected encoder.* and decoder.*; use the '
            "kind 'timm'"
        )
    if 'dist_token' in encoder:
        raise ConversionError(
            'the encoder has a distillation token (a DeiT backbone), for '
            'which mmseg has no Vision Transformer; convert a Segmenter with '
            'a plain ViT backbone'
        )
    net = _section(hints.variant, 'net_kwargs')
    hints = hints.completed(net, 'n_heads', 'image_size')
    geometry = read_geometry(encoder, hints, _WHAT)
    if geometry.hidden_dims % geometry.embed_dims:
        raise ConversionError(
            f'the feed-forward layers have {geometry.hidden_dims} channels; '
            f'mmseg needs a multiple of {geometry.embed_dims}'
        )
    _check_variant(geometry, net)
    make = _linear_head if 'head.weight' in decoder else _mask_transformer
    head = make(decoder, geometry, _section(net, 'decoder'))
    data = _section(hints.variant, 'dataset_kwargs')
    pixels, note = _normalization(hints, data, net)
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
        test_cfg=_test_cfg(geometry, hints),
    )
    return Converted(
        _renamed(state, model, geometry),
        model,
        'mmseg',
        geometry,
        _dataset_meta(data.get('dataset'), head['num_classes']),
        [note],
    )


def _section(description: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = description.get(name)
    return section if isinstance(section, dict) else {}


def _check_variant(geometry: Geometry, net: dict[str, Any]) -> None:
    for name, actual in (
        ('n_layers', geometry.num_layers),
        ('d_model', geometry.embed_dims),
        ('patch_size', geometry.patch_size),
    ):
        if number(net, name, actual) != actual:
            raise ConversionError(
                f'variant.yml says {name}={net[name]}, the weights have '
                f'{actual}; it belongs to another checkpoint (move it away) '
                'or the checkpoint is incomplete'
            )


def _linear_head(
    decoder: dict[str, Tensor], geometry: Geometry, given: dict[str, Any]
) -> dict[str, Any]:
    """The linear decoder: mmseg's ``FCNHead`` without its convolutions."""
    return dict(
        type='FCNHead',
        in_channels=geometry.embed_dims,
        channels=geometry.embed_dims,
        num_convs=0,
        kernel_size=1,
        concat_input=False,
        num_classes=shape_of(decoder, 'head.weight', 2, 'linear decoder')[0],
    )


def _mask_transformer(
    decoder: dict[str, Tensor], geometry: Geometry, given: dict[str, Any]
) -> dict[str, Any]:
    """The mask transformer; ``given`` is what variant.yml says of it."""
    for key in ('cls_emb', 'proj_dec.weight', 'blocks.0.mlp.fc1.weight'):
        if key not in decoder:
            raise ConversionError(
                'the decoder is no mask transformer and no linear one: '
                f'expected decoder.{key} or decoder.head.weight, got '
                f'{", ".join(list(decoder)[:4]) or "no decoder.*"}; other '
                'decoders cannot be converted, an incomplete file must be '
                'copied again'
            )
    what = 'mask transformer'
    classes = shape_of(decoder, 'cls_emb', 3, what)[1]
    dims = shape_of(decoder, 'proj_dec.weight', 2, what)[0]
    hidden = shape_of(decoder, 'blocks.0.mlp.fc1.weight', 2, what)[0]
    depth = count_blocks(decoder, what)
    expected = number(given, 'n_layers', depth)
    if expected != depth:
        raise ConversionError(
            f'variant.yml says the decoder has {expected:g} layers, the '
            f'weights have {depth}; the checkpoint is incomplete or another '
            'one'
        )
    # The repository gives both parts heads of the same size.
    head_dims = geometry.embed_dims // geometry.num_heads
    if dims % head_dims or hidden % dims:
        raise ConversionError(
            f'the decoder has {dims} channels and {hidden} in its '
            f'feed-forward layers; expected multiples of {head_dims} and of '
            f'{dims}: such a decoder cannot be converted'
        )
    return dict(
        type='PMSegmenterMaskTransformerHead',
        in_channels=geometry.embed_dims,
        channels=dims,
        num_layers=depth,
        num_heads=dims // head_dims,
        embed_dims=dims,
        mlp_ratio=hidden // dims,
        drop_path_rate=number(given, 'drop_path_rate', 0.0),
        norm_cfg=dict(_NORM),
        num_classes=classes,
    )


def _renamed(
    state: dict[str, Tensor], model: dict[str, Any], geometry: Geometry
) -> dict[str, Tensor]:
    """Our names, and what differs by more than its name."""
    state = dict(state)
    if 'decoder.head.weight' in state:
        weight = state['decoder.head.weight']
        state['decoder.head.weight'] = weight[:, :, None, None]
    if not geometry.qkv_bias:  # mmseg ties it to other biases
        for key in [k for k in state if k.endswith('qkv.weight')]:
            bias = torch.zeros(len(state[key]))
            state[key.replace('weight', 'bias')] = bias
    renamed = rename(state, model, 'mmseg', _NAMES, _WHAT, _IGNORED)
    for name in ('patch_proj', 'classes_proj'):
        key = f'decode_head.{name}.weight'
        if key in renamed:  # multiplied from the right there
            renamed[key] = renamed[key].T.contiguous()
    return renamed


def _normalization(
    hints: Hints, data: dict[str, Any], net: dict[str, Any]
) -> tuple[dict[str, list[float]], str]:
    """Pixel mean and deviation: given, of variant.yml, else 0.5."""
    if hints.normalization is not None:
        return normalization(hints.normalization)
    written = str(data.get('normalization', net.get('normalization')))
    name = {'vit': 'vit', 'deit': 'imagenet'}.get(written)
    return normalization(name or 'vit', guessed=name is None)


def _test_cfg(geometry: Geometry, hints: Hints) -> dict[str, Any]:
    """Sliding window as in the repository's evaluation."""
    inference = _section(hints.variant, 'inference_kwargs')
    return dict(
        mode='slide',
        crop_size=pair(inference.get('window_size') or geometry.img_size),
        stride=pair(inference.get('window_stride') or geometry.img_size),
    )


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
