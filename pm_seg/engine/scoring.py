"""Scoring and compressing a model that is built for compression."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice

import numpy as np
import torch
from mmengine.dist import all_reduce, broadcast
from mmengine.model import BaseModel, is_model_wrapper
from torch import Tensor, nn

from ..core import ProgressiveCompressor, ScoreRecorder
from ..models.compressible import CompressibleMixin
from ..models.distillation import DistillationMixin
from .faults import check_labels


def compressible_modules(model: nn.Module) -> dict[str, CompressibleMixin]:
    """Modules of the model with a ``compression``, by name."""
    if is_model_wrapper(model):
        model = model.module
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressibleMixin) and module.compressor
    }


def scored_modules(model: nn.Module) -> dict[str, CompressibleMixin]:
    """Compressible modules whose structure comes from scores, by name."""
    return {
        name: module
        for name, module in compressible_modules(model).items()
        if module.compressor.needs_scores
    }


def calibrated_modules(model: nn.Module) -> dict[str, CompressibleMixin]:
    """Compressible modules that a calibration makes better, by name."""
    return {
        name: module
        for name, module in compressible_modules(model).items()
        if isinstance(module.compressor, ProgressiveCompressor)
        and module.compressor.calibrates
    }


def require_compressible(model: nn.Module) -> dict[str, CompressibleMixin]:
    """:func:`compressible_modules`, or ``ValueError`` if there is none."""
    modules = compressible_modules(model)
    if not modules:
        raise ValueError(
            f'{type(model).__name__} has nothing to compress; give its '
            "backbone type='PMVisionTransformer' and "
            'compression=dict(keep=0.5)'
        )
    return modules


@contextmanager
def uncompressed(model: nn.Module) -> Iterator[None]:
    """All modules of the model run dense inside the block."""
    with ExitStack() as stack:
        for module in compressible_modules(model).values():
            stack.enter_context(module.compressor.disabled())
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in evaluation mode inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def full_products() -> Iterator[None]:
    """No TF32 inside: equal models would differ by more."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed all generators inside the block and put them back after it."""
    python, array = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside the block."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def take(batches: Iterable[dict], count: int) -> Iterator[dict]:
    """The first ``count`` batches, begun again when exhausted.

    Raises:
        ValueError: If there are none.
    """
    while count > 0:
        before = count
        for data in islice(batches, count):
            yield data
            count -= 1
        if count == before:
            raise ValueError(
                'the data loader yields no batch; is its dataset empty, or '
                'was its infinite sampler used before?'
            )


@contextmanager
def dense_losses(model: BaseModel) -> Iterator[None]:
    """Losses of the dense model on labels, with frozen weights."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(frozen(model))
        stack.enter_context(uncompressed(model))
        if isinstance(model, DistillationMixin):
            stack.enter_context(model.supervised())
        yield


def watch_gradients(
    model: BaseModel,
    batches: Iterable[dict],
    watchers: Iterable[AbstractContextManager],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Back-propagate the dense loss of each batch while others watch."""
    with ExitStack() as stack:
        stack.enter_context(dense_losses(model))
        for watcher in watchers:
            stack.enter_context(watcher)
        if progress:
            progress(0)
        for done, data in enumerate(batches, 1):
            check_labels(model, data)
            data = model.data_preprocessor(data, training=True)
            with torch.enable_grad():
                losses = model(**data, mode='loss')
                model.parse_losses(losses)[0].backward()
            if progress:
                progress(done)


def gather_scores(
    model: BaseModel,
    batches: Iterable[dict],
    num_batches: int,
    reduction: str = 'image',
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Gradient-weighted scores of every compressible module.

    The model runs uncompressed, in evaluation mode and full precision; its
    weights do not change. In a distributed run every process passes its own
    batches and all get the same result.

    Args:
        model (BaseModel): An mmengine model, not wrapped.
        batches (Iterable[dict]): Batches of a training data loader, with
            annotations; started again when exhausted.
        num_batches (int): How many batches to use.
        reduction (str): See :class:`~pm_seg.core.ScoreRecorder`. Defaults
            to 'image'.
        progress (Callable, optional): Called with the number of batches
            done, with 0 before the first and after each of them.

    Returns:
        dict[str, Tensor]: Scores (layers, tokens) by module name.

    Raises:
        ValueError: If nothing is compressible, or images have another size
            than the model was built for.
    """
    require_compressible(model)
    recorders: dict[str, ScoreRecorder] = {}
    for name, module in scored_modules(model).items():
        shape = module.compressor.shape
        recorders[name] = ScoreRecorder(
            module.score_taps, shape.num_tokens, shape.num_prefix, reduction
        )
    watch_gradients(
        model, take(batches, num_batches), recorders.values(), progress
    )
    for recorder in recorders.values():
        _reduce(recorder)
    return {name: recorder.scores() for name, recorder in recorders.items()}


def _reduce(recorder: ScoreRecorder) -> None:
    """Add up totals and image counts over all processes."""
    both = torch.cat([recorder.total, recorder.weight], dim=1)
    all_reduce(both)
    broadcast(both)
    recorder.total, recorder.weight = both[:, :-1], both[:, -1:]
