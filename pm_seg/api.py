"""Compression in Python, for models that were built without pm_seg.

Example:
    >>> import timm, pm_seg
    >>> model = timm.create_model('vit_tiny_patch16_224', pretrained=True)
    >>> small = pm_seg.compress_model(model, keep=0.6)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel, is_model_wrapper
from torch import nn

from .engine.compression import Measuring, Progress, compress
from .engine.scoring import compressible_modules
from .engine.user_models import (
    SUPPORTED,
    Loss,
    PlainModel,
    UserBatches,
    feature_energy,
    make_backbone_compressible,
)
from .models.timm_vit import compress_timm_vit, find_timm_vit
from .utils import shown_progress


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
    small = make_compressible(model, keep, **compression)
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
    if is_model_wrapper(model):
        raise ValueError(
            f'{type(model).__name__} is a wrapper; pass the model inside, '
            'model.module'
        )
    options = dict(compression)
    if keep is not None and options.get('type') != 'paper':
        options['keep'] = keep  # the paper's has rates
    small = copy.deepcopy(model)
    vit = find_timm_vit(small)
    if vit is not None:
        compress_timm_vit(vit, options)
        small.train(model.training)
    elif not isinstance(small, BaseModel) or not hasattr(small, 'backbone'):
        raise ValueError(
            f'{type(model).__name__} is not supported; expected {SUPPORTED}'
        )
    elif not compressible_modules(small):
        make_backbone_compressible(small.backbone, options)
        if isinstance(getattr(small, 'cfg', None), Config):
            name = type(small.backbone).__name__
            small.cfg.model.backbone.update(type=name, compression=options)
    elif compression:
        raise ValueError(
            'the model has its own compression; got '
            f'{sorted(compression)}, expected keep alone. Change the others '
            'in its config, or pass the dense model'
        )
    if keep is not None:
        for module in compressible_modules(small).values():
            module.compressor.set_keep(keep)
    return small
