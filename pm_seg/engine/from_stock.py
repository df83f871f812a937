"""Backbones of mmseg and mmpretrain that are built already, as pm_seg's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmseg.models.backbones import VisionTransformer as SegViT
from torch import Tensor, nn

from ..models.backbones import PMVisionTransformer
from ..models.compressible import CompressibleMixin
from ..models.timm_vit import SUPPORTED as TIMM
from .scoring import evaluating, full_products

_PRETRAIN = ('VisionTransformer', 'DistilledVisionTransformer')

#: What :func:`pm_seg.compress_model` takes, for messages.
SUPPORTED = (
    'an mmseg or mmpretrain model whose backbone is VisionTransformer, its '
    'distilled form, DeiT3, ViTEVA02, BEiTViT without relative position bias '
    f"or one of pm_seg's, or {TIMM}"
)


def compressible_backbone(
    stock: nn.Module, compression: dict
) -> CompressibleMixin:
    """A dense backbone as pm_seg's, with the same weights."""
    if isinstance(stock, CompressibleMixin):
        stock.build_compressor(compression, *stock.geometry)
        return stock
    if type(stock) is SegViT:
        build, arguments = PMVisionTransformer, _mmseg_arguments(stock)
    else:
        build, arguments = _mmpretrain_class(stock)
    if arguments is None:  # what the stock class built serves ours
        backbone = copy.deepcopy(stock)
        backbone.__class__ = build
        backbone.adopt(compression)
        _check_same(stock, backbone)
        return backbone
    try:
        backbone = build(**arguments, compression=compression)
        backbone.load_state_dict(stock.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f'{type(stock).__name__} has parts that {build.__name__} built '
            'from its sizes lacks; change the type in its config instead '
            f'({error})'
        ) from error
    for name, parameter in stock.named_parameters():
        ours = backbone.get_parameter(name)
        ours.requires_grad_(parameter.requires_grad)
    _check_same(stock, backbone)
    return backbone


def _mmseg_arguments(vit: SegViT) -> dict[str, Any]:
    """What an mmseg ``VisionTransformer`` was built with."""
    first, last = vit.layers[0], vit.layers[-1]
    attention, ffn, patches = first.attn, first.ffn, vit.patch_embed
    dims = attention.embed_dims
    padding = patches.adap_padding
    return dict(
        img_size=tuple(vit.img_size),
        patch_size=vit.patch_size,
        patch_pad=padding.padding if padding else patches.projection.padding,
        in_channels=patches.projection.in_channels,
        embed_dims=dims,
        num_layers=len(vit.layers),
        num_heads=attention.num_heads,
        mlp_ratio=ffn.feedforward_channels // dims,
        out_origin=vit.out_origin,
        out_indices=list(vit.out_indices),
        qkv_bias=attention.attn.in_proj_bias is not None,
        drop_rate=vit.drop_after_pos.p,
        attn_drop_rate=attention.attn.dropout,
        drop_path_rate=_drop_rate(last.attn.dropout_layer),
        with_cls_token=vit.with_cls_token,
        output_cls_token=vit.output_cls_token,
        norm_cfg=_norm_cfg(vit.layers[0].ln1),
        act_cfg=dict(type=type(ffn.layers[0][1]).__name__),
        patch_norm=patches.norm is not None,
        patch_bias=patches.projection.bias is not None,
        pre_norm=vit.pre_norm,
        final_norm=vit.final_norm,
        interpolate_mode=vit.interpolate_mode,
        num_fcs=ffn.num_fcs,
        norm_eval=vit.norm_eval,
        with_cp=vit.with_cp,
        frozen_exclude=vit.frozen_exclude,
    )


def _mmpretrain_class(
    vit: nn.Module,
) -> tuple[type[CompressibleMixin], dict[str, Any] | None]:
    """pm_seg's class for an mmpretrain backbone, and its arguments."""
    if type(vit).__module__.startswith('mmpretrain.'):
        from ..models.backbones import pretrain_variants, pretrain_vit

        if type(vit) in pretrain_variants.VARIANTS:
            return pretrain_variants.VARIANTS[type(vit)], None
        if type(vit).__name__ in _PRETRAIN:
            ours = getattr(pretrain_vit, f'PM{type(vit).__name__}')
            return ours, _mmpretrain_arguments(vit)
    raise ValueError(
        f'a backbone of type {type(vit).__name__} is not supported; expected '
        f'{SUPPORTED}'
    )


def _mmpretrain_arguments(vit: nn.Module) -> dict[str, Any]:
    """What an mmpretrain ``VisionTransformer`` was built with."""
    first, last = vit.layers[0], vit.layers[-1]
    settings = {
        key: vit.arch_settings[key]
        for key in (
            'embed_dims',
            'num_layers',
            'num_heads',
            'feedforward_channels',
        )
    }
    projection = vit.patch_embed.projection
    arguments = dict(
        arch=settings,
        img_size=tuple(vit.img_size),
        patch_size=tuple(projection.kernel_size),
        in_channels=projection.in_channels,
        out_indices=list(vit.out_indices),
        drop_rate=vit.drop_after_pos.p,
        drop_path_rate=_drop_rate(last.attn.out_drop),
        qkv_bias=first.attn.qkv.bias is not None,
        norm_cfg=_norm_cfg(first.ln1),
        final_norm=vit.final_norm,
        out_type=vit.out_type,
        frozen_stages=vit.frozen_stages,
        interpolate_mode=vit.interpolate_mode,
        layer_scale_init_value=0.0
        if isinstance(first.attn.gamma1, nn.Identity)
        else 1e-5,
        patch_cfg=dict(
            stride=tuple(projection.stride),
            bias=projection.bias is not None,
        ),
        pre_norm=not isinstance(vit.pre_norm, nn.Identity),
    )
    if not hasattr(vit, 'dist_token'):
        arguments['with_cls_token'] = vit.with_cls_token
    return arguments


def _norm_cfg(norm: nn.Module) -> dict[str, Any]:
    return dict(type='LN', eps=norm.eps)


def _drop_rate(layer: nn.Module) -> float:
    """Rate of a DropPath or Dropout, 0 of an identity."""
    return float(getattr(layer, 'drop_prob', getattr(layer, 'p', 0.0)) or 0.0)


@torch.no_grad()
def _check_same(stock: nn.Module, backbone: CompressibleMixin) -> None:
    """Raise ``ValueError`` unless both give the same outputs, dense."""
    weight = stock.patch_embed.projection.weight
    size = tuple(int(s) for s in stock.img_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, weight.shape[1], *size, generator=generator)
    backbone.to(weight)
    images = images.to(weight)
    with evaluating(stock), evaluating(backbone), full_products():
        expected = _flat(stock(images))
        with backbone.compressor.disabled():
            got = _flat(backbone(images))
    error = (expected - got).abs().max() / expected.abs().max()
    limit = 1e-4 if weight.dtype == torch.float32 else 2e-2
    if not error <= limit:
        raise ValueError(
            f'{type(backbone).__name__} built from the sizes of the given '
            f'{type(stock).__name__} differs from it by {error:.1e} of the '
            'largest output: it has options that are not carried over; '
            'change the type in its config instead'
        )


def _flat(outputs: Any) -> Tensor:
    """All tensors of nested outputs in one row."""
    if isinstance(outputs, Tensor):
        return outputs.float().flatten()
    return torch.cat([_flat(part) for part in outputs])
