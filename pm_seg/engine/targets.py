"""Choosing keep so that the model meets a budget."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mmengine.model import BaseModel
from mmengine.utils import to_2tuple

from ..utils import count_macs, median, time_interleaved
from .scoring import evaluating, require_compressible, uncompressed

TARGETS = ('gmacs', 'share', 'backbone_share', 'latency_ms')


def check_target(target: dict[str, float]) -> tuple[str, float]:
    """Return the one key and value, or raise ``ValueError``."""
    if len(target) != 1 or not set(target) <= set(TARGETS):
        raise ValueError(
            f'target={dict(target)} must have exactly one of {TARGETS}, for '
            'example target=dict(share=0.7)'
        )
    ((kind, value),) = target.items()
    shares = kind.endswith('share')
    if value <= 0 or (shares and value > 1):
        limit = 'in (0, 1]' if shares else 'above 0'
        raise ValueError(f'target {kind}={value} must be {limit}')
    return kind, float(value)


def meet_target(
    model: BaseModel, target: dict[str, float], steps: int = 12
) -> float:
    """Find the highest keep within a budget and structure the model for it.

    The same keep goes to every compressible module; bisection, from the
    scores the modules already have.

    Args:
        model (BaseModel): A scored model, not wrapped.
        target (dict): One of ``gmacs`` (of the whole model, one image of the
            native size), ``share`` (of the dense model's GMACs),
            ``backbone_share`` (the same of the backbone alone) and
            ``latency_ms`` (one image, this device, eager).
        steps (int): Bisection steps. Defaults to 12.

    Returns:
        float: The keep that was chosen.

    Raises:
        ValueError: If even the lowest keep is over the budget.
    """
    kind, limit = check_target(target)
    modules = [m.compressor for m in require_compressible(model).values()]
    backbone = model.backbone
    size = getattr(backbone, 'img_size', None)
    size = to_2tuple(size or backbone.patch_embed.img_size)  # timm
    device = next(model.parameters()).device
    images = torch.zeros(1, 3, *size, device=device)

    @torch.no_grad()
    def run() -> None:
        if kind == 'backbone_share':
            model.backbone(images)
        else:
            model(images, mode='tensor')

    def gmacs() -> float:
        return count_macs(run) / 1e9

    def latency() -> float:
        return (
            median(time_interleaved({'model': run}, rounds=7)['model']) * 1e3
        )

    cost: Callable[[], float] = latency if kind == 'latency_ms' else gmacs

    def cost_at(keep: float) -> float | None:
        """Cost at a keep, None if it leaves a layer without tokens."""
        for compressor in modules:
            compressor.keep = keep
            try:
                compressor.build()
            except ValueError:
                return None
        return cost()

    best, lowest = None, float('inf')
    low = 0.0
    high = 1.0 - max(getattr(module, 'prune', 0.0) for module in modules)
    keep = high
    with evaluating(model):
        if kind.endswith('share'):
            with uncompressed(model):
                limit *= gmacs()
        for _ in range(steps):
            value = cost_at(keep)
            if value is not None and value <= limit:
                best = keep
            if best == high:
                break
            if value is None or value <= limit:
                low = keep
            else:
                high, lowest = keep, min(lowest, value)
            keep = (low + high) / 2
        if best is not None:
            cost_at(best)
            return best
    raise ValueError(
        f'target {kind}={target[kind]} cannot be met: the lowest keep '
        f'tried still costs {lowest:.3g} against {limit:.3g}; compress '
        "more layers, or use budget='layer'"
    )
