"""Compression in Python, for models that were built without pm_seg.

Example:
    >>> import timm, pm_seg
    >>> model = timm.create_model('vit_tiny_patch16_224', pretrained=True)
    >>> small = pm_seg.compress_model(model, keep=0.6)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel, is_model_wrapper
from mmseg.models.backbones import VisionTransformer as SegViT
from torch import Tensor, nn

from .engine.compression import Measuring, Progress, compress
from .engine.scoring import compressible_modules, evaluating
from .engine.user_data import (
    Loss,
    PlainModel,
    UserBatches,
    feature_energy,
)
from .models.backbones import PMVisionTransformer
from .models.compressible import CompressibleMixin
from .models.timm_vit import SUPPORTED, compress_timm_vit, find_timm_vit
from .utils import shown_progress

_SUPPORTED = (
    'an mmseg or mmpretrain model whose backbone is VisionTransformer, its '
    'distilled form, DeiT3, ViTEVA02, BEiTViT without relative position bias '
    f"or one of pm_seg's, or {SUPPORTED}"
)
_PRETRAIN = ('VisionTransformer', 'DistilledVisionTransformer')


def compress_model(
    model: nn.Module,
    loader: Iterable | None = None,
    keep: float | None = None,
    target: dict[str, float] | None = None,
    measuring: Measuring | None = None,
    loss: Loss | None = None,
    progress: Progress | bool = True,
    **compression: Any,
) -> nn.Module:
    """A compressed copy of a built Vision Transformer, without training.

    As ``tools/compress.py`` does. The given model does not change.

    Args:
        model (nn.Module): One of mmseg or mmpretrain with a
            ``VisionTransformer``, the stock class or pm_seg's, whose backbone
            is compressed; or a ``timm.models.VisionTransformer``, whose
            blocks are. Not wrapped for distributed training.
        loader (Iterable, optional): Batches to measure on, gone through more
            than once: a list or a ``DataLoader``, no generator. For mm models
            the dicts of their data loaders (``inputs`` and
            ``data_samples``), or pairs of images as the model's data
            preprocessor takes them and labels: maps (B, H, W), or classes
            (B,). For timm models pairs of normalised images and classes, or
            images alone: then the model's own predictions are the labels.
            None works at once, without measuring.
        keep (float, optional): Share of the operations of the layers.
            Defaults to 0.5, or what the model's config says.
        target (dict, optional): A budget of the whole model instead, for
            example ``dict(share=0.5)``, see
            :func:`~pm_seg.engine.targets.meet_target`.
        measuring (Measuring, optional): On how many batches.
        loss (Callable, optional): ``loss(outputs, labels)`` to measure a
            timm model, or one without a head, with. Defaults to cross
            entropy, and without classes to the mean square of the features.
        progress (Callable | bool): True shows bars, False nothing; or called
            with what is being done, the number of steps done, and their
            total. Defaults to True.
        **compression: ``type`` and its options, see
            :func:`pm_seg.core.make_compressor`.

    Returns:
        nn.Module: Of the same kind, on the same device and in the same mode.
        ``pm_seg.engine.describe`` prints its layers.

    Raises:
        ValueError: If the model or a batch is of another kind, an option is
            wrong, or the budget is out of reach.
    """
    start = keep if target is None else None
    small = make_compressible(model, start, **compression)
    task = small
    if find_timm_vit(small) is not None:
        features = getattr(small, 'num_classes', 0) < 1
        loss = loss or (feature_energy if features else F.cross_entropy)
        task = PlainModel(small, small, loss)
    elif getattr(small, 'head', small) is None:  # mmpretrain, features alone
        task = PlainModel(small, small.extract_feat, loss or feature_energy)
    elif loss is not None:
        raise ValueError(
            'loss is for timm models and models without a head; others are '
            'measured with the losses of their heads'
        )
    batches = None if loader is None else UserBatches(task, loader)
    with shown_progress() as shown:
        if isinstance(progress, bool):
            progress = shown if progress else None
        compress(task, batches, keep, target, measuring, progress)
    return small


def make_compressible(
    model: nn.Module, keep: float | None = None, **compression: Any
) -> nn.Module:
    """A copy of a model that can be compressed, and runs so if it can.

    What :func:`compress_model` starts with, and what loads its result in
    another process::

        small = make_compressible(timm.create_model(name))
        small.load_state_dict(torch.load('small.pth'))

    The copy has the weights of the model and gives, with its compressors
    disabled, the same outputs, which is checked.

    Args:
        model (nn.Module): See :func:`compress_model`.
        keep (float, optional): Share of the operations of the layers.
            Defaults to 0.5, or what the model's config says.
        **compression: ``type`` and its options, see
            :func:`pm_seg.core.make_compressor`.

    Raises:
        ValueError: If the model is of another kind or an option is wrong.
    """
    if is_model_wrapper(model) or isinstance(
        model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
    ):
        raise ValueError(
            f'{type(model).__name__} is a wrapper; pass the model inside, '
            'model.module'
        )
    options = dict(compression)
    if keep is not None and options.get('type') != 'paper':
        options['keep'] = keep  # the paper's has rates; see set_keep
    small = copy.deepcopy(model)
    vit = find_timm_vit(small)
    if vit is not None:
        compress_timm_vit(vit, options)
        if keep is not None:
            vit.blocks.compressor.set_keep(keep)
        return small.train(model.training)
    if not isinstance(small, BaseModel) or not hasattr(small, 'backbone'):
        raise ValueError(
            f'{type(model).__name__} is not supported; expected {_SUPPORTED}'
        )
    modules = compressible_modules(small)
    if modules:
        if compression:
            raise ValueError(
                'the model has its own compression; got '
                f'{sorted(compression)}, expected keep alone. Change the '
                'others in its config, or pass the dense model'
            )
        if keep is not None:
            for module in modules.values():
                module.compressor.set_keep(keep)
        return small
    backbone = _compressible_backbone(small.backbone, options)
    backbone.to(next(small.parameters()))
    if keep is not None:
        backbone.compressor.set_keep(keep)
    backbone.train(small.backbone.training)
    small.backbone = backbone
    if isinstance(getattr(small, 'cfg', None), Config):
        name = type(backbone).__name__
        small.cfg.model.backbone.update(type=name, compression=options)
    return small


def _compressible_backbone(
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
        from .models.backbones import pretrain_variants, pretrain_vit

        if type(vit) in pretrain_variants.VARIANTS:
            return pretrain_variants.VARIANTS[type(vit)], None
        if type(vit).__name__ in _PRETRAIN:
            ours = getattr(pretrain_vit, f'PM{type(vit).__name__}')
            return ours, _mmpretrain_arguments(vit)
    raise ValueError(
        f'a backbone of type {type(vit).__name__} is not supported; expected '
        f'{_SUPPORTED}'
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
    with evaluating(stock), evaluating(backbone), _full_products():
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


@contextmanager
def _full_products() -> Iterator[None]:
    """No TF32 inside: equal models would differ by more."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _flat(outputs: Any) -> Tensor:
    """All tensors of nested outputs in one row."""
    if isinstance(outputs, Tensor):
        return outputs.float().flatten()
    return torch.cat([_flat(part) for part in outputs])
