"""The Segmenter repository's models (Strudel et al., arXiv 2105.05633)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .keys import (
    Geometry,
    Hints,
    Renaming,
    blocks,
    count_blocks,
    embeddings,
    linear,
    norm,
    number,
    pair,
    read_geometry,
    rename,
    shape_of,
)
from .results import NORMALIZATIONS, Converted
from .sources import ConversionError

_WHAT = 'Segmenter'
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
    if not any(key.startswith('encoder.') for key in state):
        # What it is instead is found out, and said, here.
        read_geometry(state, Hints(), _WHAT + ' (encoder.*, decoder.*)')
        raise ConversionError(
            'this is a classifier, expected encoder.* and decoder.*; use the '
            "kind 'timm'"
        )
    net = _section(hints, 'net_kwargs')
    encoder = _without_prefix(state, 'encoder.')
    if 'dist_token' in encoder:
        raise ConversionError(
            'the encoder has a distillation token (a DeiT backbone), for '
            'which mmseg has no Vision Transformer; convert a Segmenter with '
            'a plain ViT backbone'
        )
    hints = _complete(hints, net)
    geometry = read_geometry(encoder, hints, _WHAT)
    if geometry.hidden_dims % geometry.embed_dims:
        raise ConversionError(
            f'the feed-forward layers have {geometry.hidden_dims} channels; '
            f'mmseg needs a multiple of {geometry.embed_dims}'
        )
    _check_variant(geometry, net)
    renamings = [
        *embeddings(geometry, patch_bias=True),
        *blocks(
            geometry.num_layers,
            geometry.embed_dims,
            geometry.hidden_dims,
            geometry.qkv_bias,
            mmseg=True,
        ),
        *norm('norm', 'ln1', geometry.embed_dims),
    ]
    table = [
        Renaming(f'encoder.{old}', f'backbone.{new}', shape)
        for old, new, shape in renamings
    ]
    decoder = _without_prefix(state, 'decoder.')
    make = _linear_head if 'head.weight' in decoder else _mask_transformer
    head, entries = make(decoder, geometry, hints)
    table += [
        Renaming(f'decoder.{old}', f'decode_head.{new}', shape)
        for old, new, shape in entries
    ]
    renamed = rename(state, table, _WHAT, _IGNORED)
    _adapt(renamed, geometry)

    classes = head['num_classes']
    mean, std, note = _normalization(hints, net)
    return Converted(
        state_dict=renamed,
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor',
                mean=mean,
                std=std,
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
            decode_head=head,
            train_cfg=dict(),
            test_cfg=_test_cfg(geometry, hints),
        ),
        scope='mmseg',
        dataset_meta=_dataset_meta(hints, classes),
        notes=[note],
    )


def _without_prefix(state: dict[str, Tensor], prefix: str) -> dict:
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def _section(hints: Hints, name: str) -> dict[str, Any]:
    section = hints.variant.get(name)
    return section if isinstance(section, dict) else {}


def _complete(hints: Hints, net: dict[str, Any]) -> Hints:
    """Take from variant.yml what is not known yet."""
    changes = {}
    if hints.num_heads is None and net.get('n_heads') is not None:
        changes['num_heads'] = int(number(net, 'n_heads'))
    if hints.img_size is None and net.get('image_size') is not None:
        changes['img_size'] = pair(net['image_size'])
    return Hints(**{**vars(hints), **changes})


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
    decoder: dict[str, Tensor], geometry: Geometry, hints: Hints
) -> tuple[dict[str, Any], list[Renaming]]:
    """The linear decoder: mmseg's ``FCNHead`` without its convolutions."""
    dims = geometry.embed_dims
    classes = shape_of(decoder, 'head.weight', 2, 'linear decoder')[0]
    cfg = dict(
        type='FCNHead',
        in_channels=dims,
        channels=dims,
        num_convs=0,
        kernel_size=1,
        concat_input=False,
        **_common_head(classes),
    )
    return cfg, list(linear('head', 'conv_seg', classes, dims))


def _common_head(classes: int) -> dict[str, Any]:
    return dict(
        num_classes=classes,
        dropout_ratio=0.0,
        align_corners=False,
        loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0
        ),
    )


def _mask_transformer(
    decoder: dict[str, Tensor], geometry: Geometry, hints: Hints
) -> tuple[dict[str, Any], list[Renaming]]:
    missing = [
        key
        for key in ('cls_emb', 'proj_dec.weight', 'blocks.0.mlp.fc1.weight')
        if key not in decoder
    ]
    if missing:
        raise ConversionError(
            f'the decoder is no mask transformer and no linear one: expected '
            f'decoder.{missing[0]} or decoder.head.weight, got '
            f'{", ".join(list(decoder)[:4]) or "no decoder.*"}; other '
            'decoders cannot be converted, an incomplete file must be copied '
            'again'
        )
    what = 'mask transformer'
    classes = shape_of(decoder, 'cls_emb', 3, what)[1]
    dims = shape_of(decoder, 'proj_dec.weight', 2, what)[0]
    hidden = shape_of(decoder, 'blocks.0.mlp.fc1.weight', 2, what)[0]
    depth = count_blocks(decoder, what)
    net = _section(hints, 'net_kwargs')
    cfg_decoder = net.get('decoder')
    if not isinstance(cfg_decoder, dict):
        cfg_decoder = {}
    expected = number(cfg_decoder, 'n_layers', depth)
    if expected != depth:
        raise ConversionError(
            f'variant.yml says the decoder has {expected:g} layers, the '
            f'weights have {depth}; the checkpoint is incomplete or another '
            'one'
        )
    # The repository gives both parts heads of the same size.
    head_dims = geometry.embed_dims // geometry.num_heads
    heads = dims / head_dims
    if heads != int(heads) or hidden % dims:
        raise ConversionError(
            f'the decoder has {dims} channels and {hidden} in its '
            f'feed-forward layers; expected multiples of {head_dims} and of '
            f'{dims}: such a decoder cannot be converted'
        )
    cfg = dict(
        type='PMSegmenterMaskTransformerHead',
        in_channels=geometry.embed_dims,
        channels=dims,
        num_layers=depth,
        num_heads=int(heads),
        embed_dims=dims,
        mlp_ratio=hidden // dims,
        drop_path_rate=number(cfg_decoder, 'drop_path_rate', 0.0),
        norm_cfg=dict(_NORM),
        **_common_head(classes),
    )
    entries = [
        *blocks(depth, dims, hidden, geometry.qkv_bias, mmseg=True),
        Renaming('cls_emb', 'cls_emb', (1, classes, dims)),
        *linear('proj_dec', 'dec_proj', dims, geometry.embed_dims),
        Renaming('proj_patch', 'patch_proj.weight', (dims, dims)),
        Renaming('proj_classes', 'classes_proj.weight', (dims, dims)),
        *norm('decoder_norm', 'decoder_norm', dims),
        *norm('mask_norm', 'mask_norm', classes),
    ]
    return cfg, entries


def _adapt(state: dict[str, Tensor], geometry: Geometry) -> None:
    """What differs by more than its name."""
    for name in ('patch_proj', 'classes_proj'):
        key = f'decode_head.{name}.weight'
        if key in state:  # multiplied from the right there
            state[key] = state[key].T.contiguous()
    key = 'decode_head.conv_seg.weight'
    if key in state:
        state[key] = state[key][:, :, None, None]
    if not geometry.qkv_bias:  # mmseg ties it to other biases
        for key in [k for k in state if k.endswith('in_proj_weight')]:
            bias = torch.zeros(state[key].shape[0])
            state[key.replace('weight', 'bias')] = bias


def _normalization(
    hints: Hints, net: dict[str, Any]
) -> tuple[list[float], list[float], str]:
    """Pixel mean and deviation: given, of variant.yml, else 0.5."""
    name, reason = hints.normalization, ''
    if name is None:
        written = _section(hints, 'dataset_kwargs').get(
            'normalization', net.get('normalization')
        )
        names = {'vit': 'vit', 'deit': 'imagenet'}
        name = names.get(str(written))
        if name is None:
            name = 'vit'
            reason = ' (a guess; change it with --normalization)'
    mean, std = (list(values) for values in NORMALIZATIONS[name])
    return mean, std, f'pixel mean {mean} and std {std}{reason}'


def _test_cfg(geometry: Geometry, hints: Hints) -> dict[str, Any]:
    """Sliding window as in the repository's evaluation."""
    inference = _section(hints, 'inference_kwargs')
    window, stride = geometry.img_size, geometry.img_size
    if inference.get('window_size'):
        window = pair(inference['window_size'])
    if inference.get('window_stride'):
        stride = pair(inference['window_stride'])
    return dict(mode='slide', crop_size=window, stride=stride)


def _dataset_meta(hints: Hints, num_classes: int) -> dict[str, Any]:
    """Names and colours of the classes; numbers where they are unknown."""
    from mmseg.registry import DATASETS

    name = _section(hints, 'dataset_kwargs').get('dataset')
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
