"""Backbones of mmseg and mmpretrain that are built already, as pm_seg's."""

from __future__ import annotations

from typing import Any

import torch
from mmseg.models.backbones import VisionTransformer
from mmseg.models.backbones.vit import TransformerEncoderLayer
from torch import Tensor, nn

from ..models.backbones import PMVisionTransformer
from ..models.compressible import CompressibleMixin
from ..models.layers import (
    FusedMultiheadAttention,
    PlainFFN,
    PMTransformerEncoderLayer,
)
from ..models.timm_vit import SUPPORTED as TIMM
from .scoring import evaluating, full_products

#: What :func:`pm_seg.compress_model` takes, for messages.
SUPPORTED = (
    'an mmseg or mmpretrain model whose backbone is VisionTransformer, its '
    'distilled form, DeiT3, ViTEVA02, BEiTViT without relative position bias '
    f"or one of pm_seg's, or {TIMM}"
)


def make_backbone_compressible(backbone: nn.Module, compression: dict) -> None:
    """Turn a dense backbone into pm_seg's, in place.

    It and its layers change their classes; everything else stays. That it
    gives the same outputs as before, dense, is checked.

    Raises:
        ValueError: If it is of another kind, or its outputs differ.
    """
    if isinstance(backbone, CompressibleMixin):
        backbone.build_compressor(compression, *backbone.geometry)
        backbone.compressor.to(next(backbone.parameters()))
        return
    kind = type(backbone)
    ours = _our_class(kind)
    if ours is None:
        raise ValueError(
            f'a backbone of type {kind.__name__} is not supported; expected '
            f'{SUPPORTED}'
        )
    expected = _outputs(backbone)
    backbone.__class__ = ours
    if ours is PMVisionTransformer:
        _adopt_mmseg(backbone, compression)
    elif hasattr(ours, 'adopt'):
        backbone.adopt(compression)
    else:
        _adopt_mmpretrain(backbone, compression)
    backbone.compressor.to(expected)
    with backbone.compressor.disabled():
        error = (_outputs(backbone) - expected).abs().max()
    error = error / expected.abs().max()
    limit = 1e-4 if expected.dtype == torch.float32 else 2e-2
    if not error <= limit:
        raise ValueError(
            f'{ours.__name__} made from the given {kind.__name__} differs '
            f'from it by {error:.1e} of the largest output: it has changes '
            'that are not carried over; change the type in its config instead'
        )


def _our_class(kind: type[nn.Module]) -> type[CompressibleMixin] | None:
    if kind is VisionTransformer:
        return PMVisionTransformer
    if not kind.__module__.startswith('mmpretrain.'):
        return None
    from ..models.backbones import pretrain_variants, pretrain_vit

    return {
        pretrain_vit.VisionTransformer: pretrain_vit.PMVisionTransformer,
        pretrain_vit.DistilledVisionTransformer: (
            pretrain_vit.PMDistilledVisionTransformer
        ),
        **pretrain_variants.VARIANTS,
    }.get(kind)


def _adopt_mmseg(vit: nn.Module, compression: dict) -> None:
    _adopt_layers(vit, TransformerEncoderLayer, PMTransformerEncoderLayer)
    for layer in vit.layers:
        layer.attn.__class__ = FusedMultiheadAttention
        layer.ffn.__class__ = PlainFFN
    grid = tuple(size // vit.patch_size for size in vit.img_size)
    vit.build_compressor(compression, grid, int(vit.with_cls_token))


def _adopt_mmpretrain(vit: nn.Module, compression: dict) -> None:
    from ..models.backbones import pretrain_vit

    _adopt_layers(
        vit,
        pretrain_vit.TransformerEncoderLayer,
        pretrain_vit.PMPretrainEncoderLayer,
    )
    for layer in vit.layers:
        layer.with_cp = False
    grid = tuple(vit.patch_resolution)
    vit.build_compressor(compression, grid, vit.num_extra_tokens)


def _adopt_layers(
    vit: nn.Module, stock: type[nn.Module], ours: type[nn.Module]
) -> None:
    for layer in vit.layers:
        if type(layer) is not stock:
            raise ValueError(
                f'a layer is of type {type(layer).__name__}, expected the '
                f'{stock.__name__} of {stock.__module__}'
            )
        layer.__class__ = ours
        layer.attn.value_tap = nn.Identity()


@torch.no_grad()
def _outputs(backbone: nn.Module) -> Tensor:
    """All outputs for an image of noise, in one row."""
    weight = backbone.patch_embed.projection.weight
    size = [int(length) for length in backbone.img_size]
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(1, weight.shape[1], *size, generator=noise)
    with evaluating(backbone), full_products():
        return _flat(backbone(images.to(weight)))


def _flat(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs.flatten()
    return torch.cat([_flat(part) for part in outputs])
