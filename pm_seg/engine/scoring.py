"""Scoring a model that is built for compression, and its modes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice

import numpy as np
import torch
from mmengine.dist import all_reduce, broadcast
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.runner import set_random_seed
from torch import Tensor, nn

from ..core import ScoreRecorder
from ..models.compressible import CompressibleMixin
from ..models.distillation import DistillationMixin
from .faults import check_labels

#: Called with the steps done, 0 at first, and their total.
Steps = Callable[[int, int], None]


def no_progress(*steps: object) -> None:
    """Show nothing."""


def compressible_modules(model: nn.Module) -> dict[str, CompressibleMixin]:
    """Modules of the model with a ``compression``, by name."""
    if is_model_wrapper(model):
        model = model.module
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressibleMixin) and module.compressor
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
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices), ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        set_random_seed(seed)
        yield


def take(batches: Iterable[dict], count: int) -> Iterator[dict]:
    """The first ``count`` batches, begun again when exhausted; ``ValueError``
    if there are none."""
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


def watch_gradients(
    model: BaseModel,
    batches: Iterable[dict],
    count: int,
    watchers: Iterable[AbstractContextManager],
    progress: Steps,
) -> None:
    """Back-propagate the dense loss on labels while others watch.

    In evaluation mode, with frozen weights.
    """
    with ExitStack() as stack:
        for context in (evaluating(model), uncompressed(model), *watchers):
            stack.enter_context(context)
        if isinstance(model, DistillationMixin):
            stack.enter_context(model.supervised())
        for parameter in model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        progress(0, count)
        for done, data in enumerate(take(batches, count), 1):
            check_labels(model, data)
            data = model.data_preprocessor(data, training=True)
            with torch.enable_grad():
                losses = model(**data, mode='loss')
                model.parse_losses(losses)[0].backward()
            progress(done, count)


def add_up(*sums: Tensor) -> None:
    """Over all processes, in place, and to the last bit alike in all."""
    for values in sums:
        all_reduce(values)
        broadcast(values)


def gather_scores(
    model: BaseModel,
    batches: Iterable[dict],
    num_batches: int,
    progress: Steps | None = None,
) -> dict[str, Tensor]:
    """Gradient-weighted scores of the modules that need them.

    The model runs uncompressed, in evaluation mode and full precision; its
    weights do not change. In a distributed run every process passes its own
    batches and all get the same result.

    Args:
        model (BaseModel): An mmengine model, not wrapped.
        batches (Iterable[dict]): Of a training data loader, with
            annotations; started again when exhausted.
        num_batches (int): How many to use.
        progress (Callable, optional): Called with the batches done, 0 at
            first, and their total.

    Returns:
        dict[str, Tensor]: Scores (layers, tokens) by module name.

    Raises:
        ValueError: If nothing is compressible, or images have another size
            than the model was built for.
    """
    recorders = {
        name: ScoreRecorder(
            module.score_taps,
            module.compressor.shape.num_tokens,
            module.compressor.shape.num_prefix,
        )
        for name, module in require_compressible(model).items()
        if module.compressor.needs_scores
    }
    watchers, progress = recorders.values(), progress or no_progress
    watch_gradients(model, batches, num_batches, watchers, progress)
    for recorder in watchers:
        add_up(recorder.total, recorder.weight)
    return {name: recorder.scores() for name, recorder in recorders.items()}
