"""Backbones of mmseg and mmpretrain that are built already, as pm_seg's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..models.compressible import CompressibleMixin
from ..models.timm_vit import SUPPORTED as TIMM
from ..registry import PACKAGES
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
        backbone.build_compressor(compression)
        backbone.compressor.to(next(backbone.parameters()))
        return
    stock, ours = type(backbone), None
    package = stock.__module__.split('.')[0]
    if package in PACKAGES:  # with which ours are registered
        registry = import_module(f'{package}.registry').MODELS
        ours = registry.get(f'PM{stock.__name__}')
    if ours is None or not issubclass(ours, stock):
        raise ValueError(
            f'a backbone of type {stock.__name__} is not supported; expected '
            f'{SUPPORTED}'
        )
    expected = _outputs(backbone)
    backbone.__class__ = ours
    backbone.adopt(compression)
    backbone.compressor.to(expected)
    with backbone.compressor.disabled():
        error = (_outputs(backbone) - expected).abs().max()
    error = error / expected.abs().max()
    limit = 1e-4 if expected.dtype == torch.float32 else 2e-2
    if not error <= limit:
        raise ValueError(
            f'{ours.__name__} made from the given {stock.__name__} differs '
            f'from it by {error:.1e} of the largest output: it has changes '
            'that are not carried over; change the type in its config instead'
        )


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
