"""What is measured on a few calibration batches, without labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from mmengine.dist import all_reduce, broadcast, get_world_size
from mmengine.model import BaseModel
from torch import Tensor

from ..core.budget import LEVELS
from ..core.detail import DetailFitter
from ..models.compressible import CompressibleMixin
from ..models.distillation import soft_target_loss
from .scoring import (
    calibrated_modules,
    compressible_modules,
    evaluating,
    uncompressed,
)


def calibration_inputs(
    model: BaseModel, batches: Iterable[dict]
) -> list[Tensor]:
    """Batches through the data preprocessor, images only."""
    return [
        model.data_preprocessor(data, training=True)['inputs']
        for data in batches
    ]


def measure_losses(
    model: BaseModel,
    inputs: Sequence[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """How far the predictions move when one layer is compressed.

    The loss is the KL divergence of the class probabilities from those of
    the dense model; the model is compressed in one layer (span) of one
    module at a time, at each of :data:`pm_seg.core.budget.LEVELS`. In a
    distributed run every process passes its own images and all get the same
    result.

    Args:
        model (BaseModel): An mmengine model, not wrapped, whose modules have
            stored scores. Their structure is overwritten.
        inputs (Sequence[Tensor]): Batches of preprocessed images.
        progress (Callable, optional): Called with the number of
            measurements done and their total, with 0 done at first.

    Returns:
        dict[str, Tensor]: Losses (layers, levels) by module name, for
        modules whose budget wants them.
    """
    modules = {
        name: module
        for name, module in calibrated_modules(model).items()
        if module.compressor.wants_losses
    }
    total = len(LEVELS) * sum(
        len(module.compressor.spans) for module in modules.values()
    )
    done, losses = 0, {}
    if progress:
        progress(done, total)
    with torch.no_grad(), evaluating(model):
        with uncompressed(model):
            dense = [model(images, mode='tensor') for images in inputs]
        for name, module in modules.items():
            compressor = module.compressor
            losses[name] = torch.zeros_like(compressor.losses, device='cpu')
            for layers in compressor.spans:
                for level, share in enumerate(LEVELS):
                    compressor.build_single(layers[0], share)
                    with _only(model, module):
                        loss = sum(
                            soft_target_loss(
                                model(images, mode='tensor'), target, 1.0
                            )
                            for images, target in zip(inputs, dense)
                        )
                    losses[name][layers[0], level] = loss.cpu() / len(inputs)
                    done += 1
                    if progress:
                        progress(done, total)
    for name in losses:
        all_reduce(losses[name])
        losses[name] /= get_world_size()
        broadcast(losses[name])
    return losses


@contextmanager
def _only(model: BaseModel, module: CompressibleMixin) -> Iterator[None]:
    """All modules but one run dense inside the block."""
    with ExitStack() as stack:
        for other in compressible_modules(model).values():
            if other is not module:
                stack.enter_context(other.compressor.disabled())
        yield


def fit_details(model: BaseModel, inputs: Sequence[Tensor]) -> None:
    """Fit the detail paths of all token maps, see :mod:`pm_seg.core.detail`.

    Args:
        model (BaseModel): An mmengine model, not wrapped, with a structure.
        inputs (Sequence[Tensor]): Batches of preprocessed images.
    """
    modules = [
        m for m in calibrated_modules(model).values() if m.compressor.detail
    ]
    with (
        torch.no_grad(),
        evaluating(model),
        uncompressed(model),
        ExitStack() as stack,
    ):
        fitters = [
            stack.enter_context(DetailFitter(m.compressor, m.layers))
            for m in modules
        ]
        for images in inputs:
            model(images, mode='tensor')
    for fitter in fitters:
        all_reduce(fitter.gram)
        all_reduce(fitter.cross)
        fitter.fit()
        compressor = fitter.compressor
        broadcast(compressor.detail_down.data)
        broadcast(compressor.detail_up.data)
