"""timm's Vision Transformers, one small model of every kind."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

SMALL = dict(embed_dim=48, depth=3, num_heads=3, num_classes=7)

#: Arguments of ``timm.create_model``, by what is special about a model.
KINDS: dict[str, dict[str, Any]] = {
    'vit': dict(model_name='vit_small_patch16_224'),
    'deit distilled': dict(model_name='deit_tiny_distilled_patch16_224'),
    'deit3': dict(model_name='deit3_small_patch16_224'),
    'dinov2': dict(model_name='vit_small_patch14_dinov2'),
    'dinov2 registers': dict(model_name='vit_small_patch14_reg4_dinov2'),
    'siglip': dict(model_name='vit_base_patch16_siglip_224'),
    'so150m': dict(model_name='vit_so150m_patch16_reg4_map_256'),
    'flexivit': dict(model_name='flexivit_small'),
    'clip': dict(model_name='vit_base_patch16_clip_224'),
    'hybrid': dict(model_name='vit_tiny_r_s16_p8_224'),
    'dinov3': dict(model_name='vit_small_patch16_dinov3'),
    'dinov3 qkv bias': dict(model_name='vit_small_patch16_dinov3_qkvb'),
    'dinov3 swiglu': dict(model_name='vit_small_plus_patch16_dinov3'),
    'eva': dict(model_name='eva_giant_patch14_224', mlp_ratio=4),
    'eva02 fused': dict(model_name='eva02_tiny_patch14_224'),
    'eva02 unfused': dict(model_name='eva02_base_patch14_224'),
    'eva02 post norm': dict(model_name='eva02_enormous_patch14_clip_224'),
    'rope': dict(model_name='vit_small_patch16_rope_224'),
    'rope mixed': dict(model_name='vit_small_patch16_rope_mixed_224'),
    'rope mixed ape': dict(model_name='vit_small_patch16_rope_mixed_ape_224'),
    'rope registers': dict(model_name='vit_medium_patch16_rope_reg1_gap_256'),
    'perception encoder': dict(model_name='vit_pe_core_tiny_patch16_384'),
    'perception encoder spatial': dict(
        model_name='vit_pe_spatial_tiny_patch16_512'
    ),
    'lingbot': dict(model_name='vit_small_patch16_lingbot'),
    'sapiens2': dict(
        model_name='vit_base_patch16_sapiens2', num_heads=2, num_kv_heads=1
    ),
}

#: Where what blocks take, or how they are run, differs.
TABLES = ('vit', 'dinov3', 'rope mixed', 'eva02 unfused')


def build(kind: str, size: int = 8, **options: Any) -> nn.Module:
    """A timm model of a kind, on ``size`` x ``size`` patches.

    Weights are as large as trained ones: initial layer scales of 1e-5 or
    small position embeddings would hide errors.
    """
    torch.manual_seed(0)
    arguments = {**SMALL, **KINDS[kind], **options}
    patch = 14 if 'patch14' in arguments['model_name'] else 16
    model = timm.create_model(**{'img_size': size * patch, **arguments})
    for name, parameter in model.named_parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
        if 'gamma' in name or '.ls' in name:
            parameter.data.add_(1.0)
    return model.eval()


def images(model: nn.Module, batch: int = 2, size: int = 8) -> torch.Tensor:
    """Of ``size`` x ``size`` patches, smooth: neighbours are alike."""
    torch.manual_seed(1)
    patch = model.patch_embed.patch_size[0]
    if hasattr(model.patch_embed, 'backbone'):  # hybrid
        patch = 16
    x = torch.randn(batch, 3, size, size)
    return nn.functional.interpolate(x, scale_factor=patch, mode='bilinear')
