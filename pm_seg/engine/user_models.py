"""A user's model and batches in the form the engine measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
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

Loss = Callable[[Tensor, Tensor], Tensor]


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


class UserBatches:
    """A user's batches as dicts, from the start whenever gone through."""

    def __init__(self, model: BaseModel, loader: Iterable) -> None:
        if isinstance(loader, Iterator):
            raise ValueError(
                f'loader is a {type(loader).__name__}, which can be gone '
                'through once only; pass a list of batches or a DataLoader'
            )
        self.plain = isinstance(model, PlainModel)
        self.loader = loader

    def __iter__(self) -> Iterator[dict]:
        return map(self._as_dict, self.loader)

    def _as_dict(self, batch: Any) -> dict:
        match batch:
            case {'inputs': _}:
                return dict(batch)
            case Tensor() if self.plain:
                return dict(inputs=batch, data_samples=None)
            case [Tensor() as images, Tensor() as labels]:
                samples = labels if self.plain else _samples(labels)
                return dict(inputs=images, data_samples=samples)
        expected = 'images or (images, labels)'
        if not self.plain:
            expected = 'dict(inputs=..., data_samples=...) or (images, labels)'
        keys = sorted(batch) if isinstance(batch, Mapping) else ''
        raise ValueError(
            f'a batch is a {type(batch).__name__}{keys}; expected {expected}'
        )


def _samples(labels: Tensor) -> list:
    """Labels as the heads of mmseg or mmpretrain read them."""
    if labels.dim() == 3:
        return [
            SegDataSample(gt_sem_seg=PixelData(data=label[None]))
            for label in labels
        ]
    if labels.dim() == 1 and find_spec('mmpretrain') is not None:
        from mmpretrain.structures import DataSample

        return [DataSample().set_gt_label(label) for label in labels]
    raise ValueError(
        f'labels have shape {tuple(labels.shape)}; expected maps (B, H, W) '
        'for mmseg, classes (B,) for mmpretrain'
    )


class PlainModel(BaseModel):
    """A classifier, or what extracts features, as the engine measures it.

    Args:
        model (nn.Module): Whose modules are compressed.
        call (Callable): Images to logits, or to features.
        loss (Callable): Of those and labels.
    """

    def __init__(
        self, model: nn.Module, call: Callable[[Tensor], Any], loss: Loss
    ) -> None:
        super().__init__(getattr(model, 'data_preprocessor', None))
        self.backbone = getattr(model, 'backbone', model)
        self.call = call
        self.loss = loss
        self.to(next(model.parameters()).device)
        self.train(model.training)

    def forward(
        self,
        inputs: Tensor,
        data_samples: Tensor | None = None,
        mode: str = 'tensor',
    ) -> Tensor | dict[str, Tensor]:
        """Logits or last features, channels second; with 'loss' the loss."""
        out = self.call(inputs)
        while isinstance(out, (list, tuple)):
            out = out[-1]
        out = out.mT if out.dim() == 3 else out
        if mode == 'tensor':
            return out
        if not isinstance(data_samples, Tensor):
            data_samples = out.detach().argmax(dim=1)
        return dict(loss=self.loss(out, data_samples))


def feature_energy(features: Tensor, labels: Tensor) -> Tensor:
    """What features are measured by where there are no classes."""
    return features.float().square().mean()
