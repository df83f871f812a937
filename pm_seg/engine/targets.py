"""Budgets of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from mmengine.dist import broadcast
from mmengine.model import BaseModel
from mmengine.utils import to_2tuple

from ..utils import count_macs, median, time_interleaved
from .scoring import evaluating, require_compressible, uncompressed

TARGETS = ('gmacs', 'share', 'latency_ms')


class Target(NamedTuple):
    """A budget of the whole model.

    Attributes:
        kind (str): One of ``TARGETS``.
        value (float): Upper bound.
        batch_size (int): Images at a time, of a latency.
        compiled (bool): Whether a latency is that of ``torch.compile``.
    """

    kind: str
    value: float
    batch_size: int = 1
    compiled: bool = False


def check_target(target: dict[str, float]) -> Target:
    """Return what a dict says, or raise ``ValueError``."""
    options = dict(target)
    batch = options.pop('batch_size', 1)
    compiled = options.pop('compiled', False)
    if len(options) != 1 or not set(options) <= set(TARGETS):
        raise ValueError(
            f'target={dict(target)} must have exactly one of {TARGETS}, for '
            'example target=dict(share=0.7)'
        )
    ((kind, value),) = options.items()
    if len(target) > 1 and kind != 'latency_ms':
        raise ValueError(
            f'target={dict(target)}: batch_size and compiled go with '
            f'latency_ms alone; operations are those of one image'
        )
    if batch != int(batch) or batch < 1:
        raise ValueError(f'target batch_size={batch} must be 1 or more')
    if value <= 0 or (kind == 'share' and value > 1):
        limit = 'in (0, 1]' if kind == 'share' else 'above 0'
        raise ValueError(f'target {kind}={value} must be {limit}')
    return Target(kind, float(value), int(batch), bool(compiled))


def native_images(model: BaseModel, count: int = 1) -> torch.Tensor:
    """Images of the size the model was built for, zeros, in its type."""
    backbone = model.backbone
    size = getattr(backbone, 'img_size', None)
    vit = getattr(backbone, 'model', backbone)  # timm's with features_only
    size = to_2tuple(size or vit.patch_embed.img_size)
    weight = next(model.parameters())
    return weight.new_zeros(count, 3, *size, requires_grad=False)


def meet_target(
    model: BaseModel, target: dict[str, float], steps: int = 12
) -> float:
    """Find the highest keep within a budget of the whole model and set it.

    The same keep goes to every compressible module; bisection. In a
    distributed run the first process decides for all: latencies differ.

    Args:
        model (BaseModel): Not wrapped; with scores, if it needs them.
        target (dict): One of ``gmacs`` (of the whole model, one image of the
            native size), ``share`` (of the dense model's GMACs) and
            ``latency_ms`` (this device, the model's own precision), which
            takes ``batch_size`` (1 by default) and ``compiled`` (False)
            beside it: say what will be deployed.
        steps (int): Bisection steps. Defaults to 12.

    Returns:
        float: The keep that was chosen.

    Raises:
        ValueError: If even the lowest keep is over the budget.
    """
    kind, limit, batch, compiled = check_target(target)
    modules = [m.compressor for m in require_compressible(model).values()]
    images = native_images(model, batch)

    @torch.no_grad()
    def run() -> None:
        model(images, mode='tensor')

    def gmacs() -> float:
        return count_macs(run) / 1e9

    def latency() -> float:
        if compiled:
            torch._dynamo.reset()
        call = torch.compile(run, dynamic=False) if compiled else run
        times = time_interleaved({'model': call}, rounds=7)
        return median(times['model']) * 1e3

    cost: Callable[[], float] = latency if kind == 'latency_ms' else gmacs

    def cost_at(keep: float) -> float | None:
        """Cost at a keep, None if it is out of reach."""
        try:
            for compressor in modules:
                compressor.set_keep(keep)
        except ValueError:
            return None
        value = torch.tensor(cost(), dtype=torch.float64)
        broadcast(value)
        return value.item()

    best, lowest, unit = None, float('inf'), 1.0
    low, high = 0.0, 1.0
    keep = high
    with evaluating(model):
        if kind == 'share':
            with uncompressed(model):
                unit = gmacs()
        for _ in range(steps):
            value = cost_at(keep)
            if value is not None and value <= limit * unit:
                best = keep
            if best == 1.0:
                break
            if value is None or value <= limit * unit:
                low = keep
            else:
                high, lowest = keep, min(lowest, value)
            keep = (low + high) / 2
        if best is not None:
            for compressor in modules:
                compressor.set_keep(best)
            return best
    least = lowest / unit
    raise ValueError(
        f'target {kind}={target[kind]} cannot be met: the least found is '
        f'{kind}={least:.3g}; ask for more than that, or compress more layers '
        '(a lower first)'
    )
