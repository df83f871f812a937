"""Weighted sums over groups of tokens, and their transpose.

The two operations a token map is made of, each the other's derivative. Both
read and write every value about once, without atomic operations, so that
results do not change from run to run; and both are made of gathers, products
and sums alone, which fuse when compiled and exist in every export format.

On a CPU, ``embedding_bag`` does each in one pass where nothing is compiled or
exported. Elsewhere groups, which are numbered by size, are summed in blocks:
after one gather that brings the members of a
group next to each other, all groups of one size are a contiguous block
``(groups, size)`` to sum over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Blocks = tuple[tuple[int, int], ...]
Bags = tuple[Tensor, Tensor]

_MAX_CACHED = 8


@dataclass(frozen=True)
class Segments:
    """Which token belongs to which group.

    Attributes:
        slot (Tensor): Group of each token, int64, (T,). Tokens outside all
            groups name any.
        order (Tensor): Tokens in the order of their groups, int64.
        blocks (tuple[tuple[int, int], ...]): Size of the groups and their
            number, in the order of the groups.
        given (Tensor): The number each group had before, int64, (groups,).
    """

    slot: Tensor
    order: Tensor
    blocks: Blocks
    given: Tensor
    cache: dict[tuple[str, int], Bags] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def num_slots(self) -> int:
        """Number of groups."""
        return sum(count for _, count in self.blocks)

    def sum_bags(self, batch: int) -> Bags:
        """Index and starts of the sums over groups for ``embedding_bag``."""
        return self._bags('sum', batch)

    def gather_bags(self, batch: int) -> Bags:
        """The same for the gather: every token is a bag of one group."""
        return self._bags('gather', batch)

    def _bags(self, name: str, batch: int) -> Bags:
        key = (name, batch)
        if key not in self.cache:
            while len(self.cache) >= _MAX_CACHED:
                self.cache.pop(next(iter(self.cache)))
            self.cache[key] = self._make_bags(name, batch)
        return self.cache[key]

    @torch.inference_mode(False)
    def _make_bags(self, name: str, batch: int) -> Bags:
        if name == 'sum':
            sizes = [s for s, count in self.blocks for _ in range(count)]
            index, rows = self.order, self.slot.numel()
            starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        else:
            index, rows = self.slot, self.num_slots
            starts = torch.arange(self.slot.numel())
        image = torch.arange(batch, device=index.device)[:, None]
        return (
            (index + rows * image).flatten(),
            (starts.to(index.device) + len(index) * image).flatten(),
        )

    def to(self, device: torch.device) -> Segments:
        return Segments(
            self.slot.to(device),
            self.order.to(device),
            self.blocks,
            self.given.to(device),
        )


def make_segments(group: Tensor, num_prefix: int) -> Segments:
    """Number groups by size, prefix tokens first.

    Args:
        group (Tensor): Group of each patch token, 0..K-1 each at least once,
            -1 outside all groups, int64, (N,).
        num_prefix (int): P tokens in front, each a group of its own.

    Returns:
        Segments: Of P + N tokens in P + K groups.
    """
    live = group >= 0
    sizes = group[live].bincount()
    by_size = sizes.argsort(stable=True)
    prefix = torch.arange(num_prefix)
    given = torch.cat([prefix, by_size + num_prefix])
    patch_slot = by_size.argsort()[group.clamp_min(0)] + num_prefix
    slot = torch.cat([prefix, patch_slot])
    alive = torch.cat([live.new_ones(num_prefix), live])
    order = slot[alive].argsort(stable=True)
    order = alive.nonzero().flatten()[order]
    counts = torch.cat([sizes.new_ones(num_prefix), sizes]).bincount()
    blocks = [(s, n) for s, n in enumerate(counts.tolist()) if n]
    return Segments(slot, order, tuple(blocks), given)


def segment_sum(x: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """Weighted sum of the members of each group.

    Args:
        x (Tensor): (B, T, C).
        weight (Tensor): 0 for tokens outside all groups, (T,).
        segments (Segments): Of T tokens.

    Returns:
        Tensor: (B, groups, C).
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _SegmentSum.apply(x, weight, segments)
    return _sum(x, weight, segments)


def segment_gather(z: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    """What each token's group holds, weighted; transpose of segment_sum.

    Args:
        z (Tensor): (B, groups, C).
        weight (Tensor): 0 for tokens outside all groups, (T,).
        segments (Segments): Of T tokens.

    Returns:
        Tensor: (B, T, C).
    """
    if torch.is_grad_enabled() and (z.requires_grad or weight.requires_grad):
        return _SegmentGather.apply(z, weight, segments)
    return _gather(z, weight, segments)


def _use_bags(x: Tensor) -> bool:
    """Whether one fused kernel does gather, product and sum."""
    return x.device.type == 'cpu' and not torch.compiler.is_compiling()


def _sum(x: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    weight = weight.to(x.dtype).index_select(0, segments.order)
    if _use_bags(x):
        return _bag(x, weight, *segments.sum_bags(len(x)))
    x = x.index_select(1, segments.order) * weight.unsqueeze(-1)
    start, sums = 0, []
    for size, count in segments.blocks:
        block = x[:, start : start + size * count]
        if size > 1:
            block = block.unflatten(1, (count, size)).sum(2)
        sums.append(block)
        start += size * count
    return torch.cat(sums, 1)


def _gather(z: Tensor, weight: Tensor, segments: Segments) -> Tensor:
    weight = weight.to(z.dtype)
    if _use_bags(z):
        return _bag(z, weight, *segments.gather_bags(len(z)))
    return z.index_select(1, segments.slot) * weight.unsqueeze(-1)


def _bag(
    rows: Tensor, weight: Tensor, index: Tensor, starts: Tensor
) -> Tensor:
    """Weighted sums of rows of each image, by ``embedding_bag``."""
    batch, _, channels = rows.shape
    out = F.embedding_bag(
        index,
        rows.reshape(-1, channels),
        starts,
        mode='sum',
        per_sample_weights=weight.repeat(batch),
    )
    return out.view(batch, -1, channels)


def _weight_grad(
    weight: Tensor, tokens: Tensor, grouped: Tensor, segments: Segments
) -> Tensor:
    """<token, its group's value>, (T,)."""
    grouped = grouped.index_select(1, segments.slot)
    grad = torch.einsum('btc,btc->t', tokens.to(grouped.dtype), grouped)
    return grad.to(weight.dtype)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, segments):
        ctx.save_for_backward(x, weight)
        ctx.segments = segments
        return _sum(x, weight, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _gather(grad, weight, ctx.segments)
        if ctx.needs_input_grad[1]:
            order = ctx.segments.order
            grad_weight = _weight_grad(weight, x, grad, ctx.segments)
            if order.numel() < weight.numel():  # tokens outside all groups
                inside = grad_weight.index_select(0, order)
                grad_weight = torch.zeros_like(grad_weight)
                grad_weight = grad_weight.index_copy(0, order, inside)
        return grad_x, grad_weight, None


class _SegmentGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weight, segments):
        ctx.save_for_backward(z, weight)
        ctx.segments = segments
        return _gather(z, weight, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, weight = ctx.saved_tensors
        grad_z = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_z = _sum(grad, weight, ctx.segments)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_grad(weight, grad, z, ctx.segments)
        return grad_z, grad_weight, None
