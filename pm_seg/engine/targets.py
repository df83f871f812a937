"""Budgets of the whole model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mmengine.dist import broadcast
from mmengine.model import BaseModel
from mmengine.utils import to_2tuple

from ..utils import count_macs, median, time_interleaved
from .scoring import evaluating, require_compressible, uncompressed

TARGETS = ('gmacs', 'share', 'latency_ms')


def check_target(target: dict[str, float]) -> tuple[str, float]:
    """Return the one key and value, or raise ``ValueError``."""
    if len(target) != 1 or not set(target) <= set(TARGETS):
        raise ValueError(
            f'target={dict(target)} must have exactly one of {TARGETS}, for '
            'example target=dict(share=0.7)'
        )
    ((kind, value),) = target.items()
    if value <= 0 or (kind == 'share' and value > 1):
        limit = 'in (0, 1]' if kind == 'share' else 'above 0'
        raise ValueError(f'target {kind}={value} must be {limit}')
    return kind, float(value)


def native_images(model: BaseModel) -> torch.Tensor:
    """One image of the size the model was built for, zeros."""
    backbone = model.backbone
    size = getattr(backbone, 'img_size', None)
    vit = getattr(backbone, 'model', backbone)  # timm's with features_only
    size = to_2tuple(size or vit.patch_embed.img_size)
    return torch.zeros(1, 3, *size, device=next(model.parameters()).device)


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
            ``latency_ms`` (one image, this device, eager: compiled or in
            batches it is another).
        steps (int): Bisection steps. Defaults to 12.

    Returns:
        float: The keep that was chosen.

    Raises:
        ValueError: If even the lowest keep is over the budget.
    """
    kind, limit = check_target(target)
    modules = [m.compressor for m in require_compressible(model).values()]
    images = native_images(model)

    @torch.no_grad()
    def run() -> None:
        model(images, mode='tensor')

    def gmacs() -> float:
        return count_macs(run) / 1e9

    def latency() -> float:
        times = time_interleaved({'model': run}, rounds=7)
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
