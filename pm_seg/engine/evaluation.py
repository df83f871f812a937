"""Accuracy and speed of a compressed model beside the dense one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.utils import to_2tuple

from ..utils import count_macs, time_interleaved
from .scoring import evaluating, uncompressed


@torch.no_grad()
def evaluate(
    model: BaseModel,
    cfg: Config,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Metrics on the validation data, outside of any run.

    Args:
        model (BaseModel): Not wrapped.
        cfg (Config): With ``val_dataloader`` and ``val_evaluator``.
        progress (Callable, optional): Called with the number of batches done
            and their total.
    """
    loader = Runner.build_dataloader(cfg.val_dataloader)
    with _quiet():
        evaluator = Evaluator(cfg.val_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    with evaluating(model):
        for done, data in enumerate(loader, 1):
            outputs = model.val_step(data)
            evaluator.process(data_samples=outputs, data_batch=data)
            if progress:
                progress(done, len(loader))
    with _quiet():
        return evaluator.evaluate(len(loader.dataset))


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines of metrics, which print tables of all classes."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.inference_mode()
def compare_speed(model: BaseModel, rounds: int = 9) -> dict[str, list[float]]:
    """Seconds of one image of the native size, dense and compressed in turns.

    Args:
        model (BaseModel): With a structure, on the device to time.
        rounds (int): Timed calls of each. Defaults to 9.

    Returns:
        dict[str, list[float]]: Times of 'dense' and 'compressed'.
    """
    compressed, dense = _calls(model)
    with evaluating(model):
        return time_interleaved(
            {'dense': dense, 'compressed': compressed}, rounds
        )


def compare_macs(model: BaseModel) -> dict[str, int]:
    """Multiply-accumulates of one image, 'dense' and 'compressed'."""
    compressed, dense = _calls(model)
    with evaluating(model):
        return {
            'dense': count_macs(dense),
            'compressed': count_macs(compressed),
        }


def _calls(
    model: BaseModel,
) -> tuple[Callable[[], None], Callable[[], None]]:
    size = to_2tuple(model.backbone.img_size)
    device = next(model.parameters()).device
    images = torch.zeros(1, 3, *size, device=device)

    def compressed() -> None:
        model(images, mode='tensor')

    def dense() -> None:
        with uncompressed(model):
            compressed()

    return compressed, dense
