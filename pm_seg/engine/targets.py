"""Budgets of the whole model."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

import torch
from mmengine.dist import broadcast
from mmengine.model import BaseModel
from mmengine.utils import to_2tuple

from ..utils import count_macs, median, time_interleaved
from .scoring import evaluating, require_compressible, uncompressed

TARGETS = ('gmacs', 'share', 'latency_ms')


def check_target(target: dict[str, float]) -> tuple[str, float, int, bool]:
    """Kind, upper bound, and of a latency the batch size and whether it is of
    compiled code; or ``ValueError``."""
    kinds = set(target) - {'batch_size', 'compiled'}
    if len(kinds) != 1 or not kinds <= set(TARGETS):
        raise ValueError(
            f'target={dict(target)} must have exactly one of {TARGETS}, for '
            'example target=dict(share=0.7)'
        )
    (kind,) = kinds
    if len(target) > 1 and kind != 'latency_ms':
        raise ValueError(
            f'target={dict(target)}: batch_size and compiled go with '
            'latency_ms alone; operations are those of one image'
        )
    value, batch = target[kind], target.get('batch_size', 1)
    if batch != int(batch) or batch < 1:
        raise ValueError(f'target batch_size={batch} must be 1 or more')
    if value <= 0 or (kind == 'share' and value > 1):
        limit = 'in (0, 1]' if kind == 'share' else 'above 0'
        raise ValueError(f'target {kind}={value} must be {limit}')
    return kind, float(value), int(batch), bool(target.get('compiled'))


def native_calls(
    model: BaseModel, batch: int = 1
) -> dict[str, Callable[[], object]]:
    """Run the model, 'dense' and 'compressed', on zeros of the size it was
    built for."""
    backbone = model.backbone
    vit = getattr(backbone, 'model', backbone)  # timm's with features_only
    size = getattr(backbone, 'img_size', None) or vit.patch_embed.img_size
    images = next(model.parameters()).new_zeros(batch, 3, *to_2tuple(size))

    @torch.no_grad()
    def compressed() -> object:
        return model(images, mode='tensor')

    def dense() -> object:
        with uncompressed(model):
            return compressed()

    return dict(dense=dense, compressed=compressed)


def meet_target(model: BaseModel, target: dict[str, float]) -> float:
    """Find the highest keep within a budget of the whole model and set it.

    The same keep goes to every compressible module; 12 steps of bisection. In
    a distributed run the first process decides for all: latencies differ.

    Args:
        model (BaseModel): Not wrapped; with scores, if it needs them.
        target (dict): One of ``gmacs`` (of the whole model, one image of the
            native size), ``share`` (of the dense model's GMACs) and
            ``latency_ms`` (this device, the model's own precision), which
            takes ``batch_size`` (1 by default) and ``compiled`` (False)
            beside it: say what will be deployed.

    Returns:
        float: The keep that was chosen.

    Raises:
        ValueError: If even the lowest keep is over the budget.
    """
    kind, limit, batch, compiled = check_target(target)
    modules = require_compressible(model).values()
    calls = native_calls(model, batch)
    run = calls['compressed']
    costs: dict[int, float] = {}

    def set_keep(keep: float) -> None:
        for module in modules:
            module.compressor.set_keep(keep)

    def cost_at(step: int) -> float:
        """Of a keep of step / 2048, 0 if that is out of reach."""
        try:
            set_keep(step / 2048)
        except ValueError:
            return 0.0
        if kind == 'latency_ms':
            if compiled:
                torch._dynamo.reset()
            call = torch.compile(run, dynamic=False) if compiled else run
            times = time_interleaved({'model': call}, rounds=7)
            value = median(times['model']) * 1e3
        else:
            value = count_macs(run) / 1e9
        value = torch.tensor(value, dtype=torch.float64)
        broadcast(value)
        costs[step] = value.item()
        return costs[step]

    with evaluating(model):
        if kind == 'share':
            limit *= count_macs(calls['dense']) / 1e9
        set_keep(1.0)  # says why if no keep can be set at all
        if cost_at(2048) <= limit:
            return 1.0
        found = bisect_right(range(2048), limit, key=cost_at) - 1
    if found not in costs:
        least = min(costs.values()) / limit * target[kind]
        raise ValueError(
            f'target {kind}={target[kind]} cannot be met: the least found is '
            f'{kind}={least:.3g}; ask for more than that, or compress more '
            'layers (a lower first)'
        )
    set_keep(found / 2048)
    return found / 2048
