"""From a dense model to a compressed one, without training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from .calibration import calibrated_modules, choose_settings, fit_importance
from .scoring import (
    compressible_modules,
    gather_scores,
    isolated_rng,
    no_progress,
    require_compressible,
    take,
)
from .targets import meet_target

#: Called with what is being done, the steps done, 0 at first, and their total.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measuring:
    """On how much data a compression measures.

    Attributes:
        score_batches (int): Training batches to score where a structure
            needs scores (``type='paper'``).
        calib_batches (int): Training batches for importance and schedule,
            0 for none.
        seed (int): Of the batches and their augmentation.
    """

    score_batches: int = 50
    calib_batches: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.score_batches < 1 or self.calib_batches < 0:
            raise ValueError(
                f'score_batches={self.score_batches} must be at least 1 and '
                f'calib_batches={self.calib_batches} at least 0'
            )


def compress(
    model: BaseModel,
    dataloader: DataLoader | dict | None = None,
    keep: float | None = None,
    target: dict[str, float] | None = None,
    measuring: Measuring | None = None,
    progress: Progress | None = None,
) -> None:
    """Compress a dense model to a budget, without training.

    Scores, where the structure comes from scores; importance and the best
    schedule on a few images, where tokens merge by similarity and there are
    images. What a checkpoint brings, scores and importance, is not measured
    again; the schedule is, where there is a budget to meet. The result
    depends on the weights, the data and the seed alone; no other weight and
    no random state changes. In a distributed run every process passes its
    own batches and all get the same result.

    Args:
        model (BaseModel): An mmengine model, not wrapped.
        dataloader (DataLoader | dict, optional): Of training batches, or its
            config, which is then built anew with ``seed``. None will do
            unless scores are needed, see :func:`needs_data`.
        keep (float, optional): Share of the layers' MACs. Defaults to what
            the config says.
        target (dict, optional): A budget of the whole model instead, see
            :func:`~pm_seg.engine.targets.meet_target`.
        measuring (Measuring, optional): On how much data.
        progress (Callable, optional): Called with what is being done, the
            steps done, 0 at first, and their total.

    Raises:
        ValueError: If nothing is compressible, the budget is out of reach, or
            data is needed and there is none.
    """
    if keep is not None and target is not None:
        raise ValueError(
            f'got keep={keep} and target={target}; they exclude each other'
        )
    modules = require_compressible(model)
    scoring = needs_data(model)
    if scoring and dataloader is None:
        raise ValueError(
            'this compression needs scores, and scores need images: pass a '
            "data loader, or use type='pm', which works without"
        )
    measuring, progress = measuring or Measuring(), progress or no_progress
    with isolated_rng(measuring.seed):
        if scoring:
            loader = _from_start(dataloader, measuring.seed)
            report = partial(progress, 'Scoring batches')
            count = measuring.score_batches
            scores = gather_scores(model, loader, count, report)
            for name, found in scores.items():
                modules[name].compressor.store(found)
        for module in modules.values():
            if keep is not None:
                module.compressor.set_keep(keep)
            elif target is None and module.compressor.needs_scores:
                module.compressor.build()
        if target is not None:
            meet_target(model, target)
        calibrated = calibrated_modules(model)
        known = all(m.compressor.calibrated for m in calibrated)
        same = known and keep is None and target is None
        images = dataloader is not None and measuring.calib_batches
        if calibrated and images and not same:
            loader = _from_start(dataloader, measuring.seed)
            batches = list(take(loader, measuring.calib_batches))
            if not known:
                report = partial(progress, 'Importance of tokens')
                fit_importance(model, batches, report)
            choose_settings(model, batches, partial(progress, 'Ways to merge'))
            if target is not None:
                meet_target(model, target)
    for module in modules.values():
        module.compressor.settle()


def _from_start(dataloader: DataLoader | dict, seed: int) -> Iterable[dict]:
    """A loader; if a config is given, a new one."""
    if isinstance(dataloader, dict):
        dataloader = {**dataloader, 'persistent_workers': False}
        return Runner.build_dataloader(dataloader, seed=seed)
    return dataloader


def calibration_loader(cfg: Config) -> dict:
    """The config's training loader, with ``calib_pipeline`` if there is one:
    what is measured suits test images better when it is measured on images
    like those, not on distorted crops.
    """
    loader = copy.deepcopy(cfg.train_dataloader)
    if cfg.get('calib_pipeline'):
        dataset = loader['dataset']
        while 'dataset' in dataset:
            dataset = dataset['dataset']
        dataset['pipeline'] = copy.deepcopy(cfg.calib_pipeline)
    return loader


def needs_data(model: BaseModel) -> bool:
    """Whether :func:`compress` cannot do without images for this model."""
    compressors = [m.compressor for m in compressible_modules(model).values()]
    return any(c.needs_scores and not c.has_scores for c in compressors)
