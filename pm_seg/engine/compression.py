"""From a dense model to a compressed one, without training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import DataLoader

from .calibration import (
    calibration_inputs,
    fit_details,
    measure_losses,
)
from .faults import require_images
from .scoring import (
    calibrated_modules,
    gather_scores,
    isolated_rng,
    require_compressible,
    scored_modules,
    take,
)
from .targets import meet_target

#: Called with what is being done, the steps done and their total; with 0
#: done when it begins.
Progress = Callable[[str, int, int], None]


def compress(
    model: BaseModel,
    dataloader: DataLoader | dict | None,
    num_batches: int = 50,
    reduction: str = 'image',
    seed: int = 0,
    target: dict[str, float] | None = None,
    calib_batches: int = 2,
    progress: Progress | None = None,
) -> float | None:
    """Give a dense model its structure.

    Scores on training batches; the loss of compressing each layer, where a
    module's budget needs it; groups; the fit of the detail paths. What the
    model has already, from a checkpoint, is not measured again. The result
    depends on the weights, the data and the seed alone; no other weight and
    no random state changes. In a distributed run every process passes its
    own batches and all get the same result.

    Args:
        model (BaseModel): An mmengine model, not wrapped.
        dataloader (DataLoader | dict, optional): A loader of training
            batches, or the config of one, which is then built anew with
            ``seed``. None will do if nothing is left to measure, see
            :func:`needs_data`.
        num_batches (int): Batches to score. Defaults to 50.
        reduction (str): See :class:`~pm_seg.core.ScoreRecorder`. Defaults to
            'image'.
        seed (int): Seed of the batches and their augmentation. Defaults to
            0.
        target (dict, optional): A budget instead of ``keep``, see
            :func:`~pm_seg.engine.targets.meet_target`.
        calib_batches (int): Batches for the losses and the detail paths.
            Defaults to 2.
        progress (Callable, optional): Called with what is being done, the
            number of steps done, 0 at first, and their total.

    Returns:
        float | None: The keep that meets the target.

    Raises:
        ValueError: If nothing is compressible, or the target is out of
            reach.
    """
    require_compressible(model)

    def report(title: str) -> Callable[[int, int], None] | None:
        return progress and (lambda *steps: progress(title, *steps))

    with isolated_rng(seed):
        modules = calibrated_modules(model)
        compressors = [module.compressor for module in modules.values()]
        if not all(compressor.has_scores for compressor in compressors):
            scoring = report('Scoring batches')
            scores = gather_scores(
                model,
                _fresh(dataloader, seed),
                num_batches,
                reduction,
                scoring and (lambda done: scoring(done, num_batches)),
            )
            for name, module in scored_modules(model).items():
                module.compressor.store(scores[name])
        inputs = []
        if needs_data(model):
            batches = take(_fresh(dataloader, seed), calib_batches)
            inputs = calibration_inputs(model, batches)
        if any(compressor.wants_losses for compressor in compressors):
            losses = measure_losses(model, inputs, report('Measuring layers'))
            for name, measured in losses.items():
                modules[name].compressor.store(losses=measured)
        keep = None
        if target is not None:
            keep = meet_target(model, target)
        else:
            for module in require_compressible(model).values():
                module.compressor.build()
        fit_details(model, inputs)
    return keep


def _fresh(
    dataloader: DataLoader | dict, seed: int
) -> DataLoader | Iterable[dict]:
    """A loader at its first batch, if a config is given."""
    if not isinstance(dataloader, dict):
        return dataloader
    config = copy.deepcopy(dataloader)
    config['persistent_workers'] = False
    try:
        loader = Runner.build_dataloader(config, seed=seed)
    except ValueError as error:
        if 'at least one array' not in str(error):  # numpy, in mmengine
            raise
        raise ValueError(
            'the dataset to score on is empty; check data_root, data_prefix, '
            'img_suffix and ann_file of train_dataloader'
        ) from error
    require_images(loader.dataset)
    return loader


def calibration_loader(cfg: Config) -> dict:
    """Config of the loader to score and calibrate on.

    The training loader, with the transforms of ``cfg.calib_pipeline`` if
    there is one: structures and detail paths suit test images better when
    they are found on images like those, not on distorted crops.
    """
    loader = copy.deepcopy(cfg.train_dataloader)
    if cfg.get('calib_pipeline'):
        dataset = loader['dataset']
        while 'dataset' in dataset:
            dataset = dataset['dataset']
        dataset['pipeline'] = copy.deepcopy(cfg.calib_pipeline)
    return loader


def needs_data(model: BaseModel) -> bool:
    """Whether :func:`compress` needs images for this model."""
    return any(
        not module.compressor.has_scores
        or module.compressor.wants_losses
        or module.compressor.detail
        for module in calibrated_modules(model).values()
    )


def apply_scores(
    model: BaseModel,
    scores: dict[str, Tensor],
    losses: dict[str, Tensor] | None = None,
) -> None:
    """Derive the structure of each module from given scores and losses."""
    for name, module in scored_modules(model).items():
        module.compressor.set_scores(scores[name], (losses or {}).get(name))
