"""What a few images say about how to merge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from mmengine.dist import all_reduce, broadcast
from mmengine.model import BaseModel
from torch import Tensor

from ..core import ImportanceFitter
from ..models.compressible import CompressibleMixin
from ..models.distillation import soft_target_loss
from .scoring import (
    calibrated_modules,
    evaluating,
    uncompressed,
    watch_gradients,
)

#: What is tried, one after the other, each time the best is kept. Importance
#: helps where half of the operations are left and harms at a third; a gain
#: below 1 helps some models and harms others.
SEARCH = {
    'strength': (0.0, 0.05, 0.1, 0.2),
    'power': (1.0, 0.6, 0.8, 1.25, 1.6),  # times the schedule's
    'gain': (1.0, 0.9, 0.8),  # times what there is
}

Steps = Callable[[int, int], None]


def fit_importance(
    model: BaseModel,
    batches: Sequence[dict],
    progress: Steps | None = None,
) -> None:
    """Fit and store what makes a token important, in every layer.

    The model runs uncompressed, its weights do not change. In a distributed
    run every process passes its own batches and all get the same result.

    Args:
        model (BaseModel): An mmengine model, not wrapped.
        batches (Sequence[dict]): Of a training data loader, with annotations.
        progress (Callable, optional): Called with the batches done and their
            total, with 0 done at first.
    """
    fitters: dict[str, ImportanceFitter] = {}
    modules = calibrated_modules(model)
    for name, module in modules.items():
        shape = module.compressor.shape
        fitters[name] = ImportanceFitter(
            module.blocks, module.score_taps, shape.num_prefix, shape.dims
        )
    watch_gradients(
        model,
        batches,
        fitters.values(),
        progress and (lambda done: progress(done, len(batches))),
    )
    for name, fitter in fitters.items():
        for moments in (fitter.gram, fitter.cross):
            all_reduce(moments)
            broadcast(moments)
        modules[name].compressor.set_importance(0.0, fitter.directions())


def calibration_inputs(
    model: BaseModel, batches: Iterable[dict]
) -> list[Tensor]:
    """Batches through the data preprocessor, images only."""
    return [
        model.data_preprocessor(data, training=True)['inputs']
        for data in batches
    ]


def choose_settings(
    model: BaseModel,
    inputs: Sequence[Tensor],
    progress: Steps | None = None,
) -> dict[str, float]:
    """Choose how to merge, at the same cost, from :data:`SEARCH`.

    By the KL divergence of the predictions from those of the dense model. In
    a distributed run all processes choose the same.

    Args:
        model (BaseModel): An mmengine model, not wrapped, at the budget that
            is wanted.
        inputs (Sequence[Tensor]): Batches of preprocessed images.
        progress (Callable, optional): Called with the settings tried and
            their total, with 0 done at first.

    Returns:
        dict[str, float]: What was chosen.
    """
    modules = list(calibrated_modules(model).values())
    starts = [
        (module.compressor.schedule.power, module.compressor.gain.clone())
        for module in modules
    ]
    search = dict(SEARCH)
    if not any(module.compressor.has_gain for module in modules):
        search['gain'] = SEARCH['gain'][:1]
    chosen = {name: values[0] for name, values in search.items()}
    total = sum(map(len, search.values())) - len(search) + 1
    done = 0
    if progress:
        progress(0, total)

    def loss(settings: dict[str, float]) -> float:
        nonlocal done
        value = torch.tensor(float('inf'), dtype=torch.float64)
        if _apply(modules, starts, settings):
            value = sum(
                soft_target_loss(model(images, mode='tensor'), target, 1.0)
                for images, target in zip(inputs, dense)
            ).double()
        all_reduce(value)
        broadcast(value)
        done += 1
        if progress:
            progress(done, total)
        return value.item()

    with torch.no_grad(), evaluating(model):
        with uncompressed(model):
            dense = [model(images, mode='tensor') for images in inputs]
        best = loss(chosen)
        for name, values in search.items():
            for value in values[1:]:
                tried = {**chosen, name: value}
                found = loss(tried)
                if found < best:
                    best, chosen = found, tried
        _apply(modules, starts, chosen)
    return chosen


def _apply(
    modules: Sequence[CompressibleMixin],
    starts: Sequence[tuple[float, Tensor]],
    settings: dict[str, float],
) -> bool:
    """Set the settings, from the powers and gains there were at first;
    whether the budget can be met with them.
    """
    for module, (power, gain) in zip(modules, starts):
        compressor = module.compressor
        compressor.set_importance(settings['strength'])
        compressor.gain.data.copy_(gain * settings['gain'])
        try:
            compressor.set_keep(compressor.keep, power * settings['power'])
        except ValueError:
            return False
    return True
