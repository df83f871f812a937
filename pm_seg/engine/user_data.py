"""A user's model and batches in the form the engine measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from mmengine.model import BaseModel
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


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
