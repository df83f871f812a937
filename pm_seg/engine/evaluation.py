"""Accuracy and speed of a compressed model beside the dense one."""

from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ..utils import count_macs, time_interleaved
from .scoring import Steps, evaluating, no_progress
from .targets import native_calls


def evaluate(
    model: BaseModel, cfg: Config, progress: Steps = no_progress
) -> dict[str, float]:
    """Metrics on the validation data of a config, outside of any run."""
    loader = Runner.build_dataloader(cfg.val_dataloader)
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')  # metrics print tables of all classes
    try:
        evaluator = Evaluator(cfg.val_evaluator)
        evaluator.dataset_meta = loader.dataset.metainfo
        return measure(model, loader, evaluator, progress)
    finally:
        logger.setLevel(level)


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: DataLoader,
    evaluator: Evaluator,
    progress: Steps = no_progress,
) -> dict[str, float]:
    """Metrics of a model, wrapped or not, without the hooks of a run."""
    with evaluating(model):
        for done, data in enumerate(loader, 1):
            outputs = model.val_step(data)
            evaluator.process(data_samples=outputs, data_batch=data)
            progress(done, len(loader))
    return evaluator.evaluate(len(loader.dataset))


@torch.inference_mode()
def compare_speed(model: BaseModel, rounds: int = 9) -> dict[str, list[float]]:
    """Seconds of one image of the native size, 'dense' and 'compressed'.

    In turns, ``rounds`` of each, on the model's device.
    """
    with evaluating(model):
        return time_interleaved(native_calls(model), rounds)


def compare_macs(model: BaseModel) -> dict[str, int]:
    """Multiply-accumulates of one image, 'dense' and 'compressed'."""
    with evaluating(model):
        return {name: count_macs(f) for name, f in native_calls(model).items()}
