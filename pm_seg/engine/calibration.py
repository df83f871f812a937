"""What a few images say about how to merge."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import count

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from ..core import ImportanceFitter, ProgressiveCompressor
from ..models.compressible import CompressibleMixin
from ..models.distillation import soft_target_loss
from .scoring import (
    Steps,
    add_up,
    compressible_modules,
    evaluating,
    no_progress,
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


def calibrated_modules(model: nn.Module) -> list[CompressibleMixin]:
    """Compressible modules that a calibration makes better."""
    return [
        module
        for module in compressible_modules(model).values()
        if isinstance(module.compressor, ProgressiveCompressor)
        and module.compressor.calibrates
    ]


def fit_importance(
    model: BaseModel, batches: Sequence[dict], progress: Steps = no_progress
) -> None:
    """Fit and store what makes a token important, in every layer.

    On training batches with annotations. The model, not wrapped, runs
    uncompressed, its weights do not change. In a distributed run every
    process passes its own batches and all get the same result.
    """
    modules, fitters = calibrated_modules(model), []
    for module in modules:
        shape, taps = module.compressor.shape, module.score_taps
        fitters.append(
            ImportanceFitter(module.blocks, taps, shape.num_prefix, shape.dims)
        )
    watch_gradients(model, batches, len(batches), fitters, progress)
    for module, fitter in zip(modules, fitters):
        add_up(fitter.gram, fitter.cross)
        directions, components = fitter.directions(), fitter.components()
        module.compressor.learn(directions, components)


def choose_settings(
    model: BaseModel, batches: Sequence[dict], progress: Steps = no_progress
) -> dict[str, float]:
    """Choose how to merge, at the same cost, from :data:`SEARCH`.

    For a model, not wrapped, at the budget that is wanted; by the KL
    divergence of its predictions from those of the dense model. In a
    distributed run all processes choose the same.
    """
    inputs = [
        model.data_preprocessor(data, training=True)['inputs']
        for data in batches
    ]
    compressors = [m.compressor for m in calibrated_modules(model)]
    starts = [(c.schedule.power, c.gain.clone()) for c in compressors]
    chosen = {name: values[0] for name, values in SEARCH.items()}
    search = dict(SEARCH)
    if not any(compressor.has_gain for compressor in compressors):
        del search['gain']
    total = 1 + sum(len(values) - 1 for values in search.values())
    done = count(1)

    @cache
    def loss(**settings: float) -> float:
        value = torch.tensor(float('inf'), dtype=torch.float64)
        if _apply(compressors, starts, settings):
            value = sum(
                soft_target_loss(model(images, mode='tensor'), target, 1.0)
                for images, target in zip(inputs, dense)
            ).double()
        add_up(value)
        progress(next(done), total)
        return value.item()

    with torch.no_grad(), evaluating(model):
        progress(0, total)
        with uncompressed(model):
            dense = [model(images, mode='tensor') for images in inputs]
        for name, values in search.items():
            tried = [{**chosen, name: value} for value in values]
            chosen = min(tried, key=lambda settings: loss(**settings))
        _apply(compressors, starts, chosen)
    return chosen


def _apply(
    compressors: Sequence[ProgressiveCompressor],
    starts: Sequence[tuple[float, Tensor]],
    settings: dict[str, float],
) -> bool:
    """Change the powers and gains there were at first, and the strength;
    whether the budget can be met with them.
    """
    for compressor, (power, gain) in zip(compressors, starts):
        compressor.set_strength(settings['strength'])
        compressor.gain.data.copy_(gain * settings['gain'])
        try:
            compressor.set_keep(compressor.keep, power * settings['power'])
        except ValueError:
            return False
    return True
