"""Sums over groups of tokens, and their transpose.

The two operations a token map is made of, each the other's derivative, for
groups that are the same in all images (``segment_sum``, ``segment_gather``,
weighted) and for groups of each image (``image_sum``, ``image_gather``). All
read and write every value about once, without atomic operations, so that
results do not change from run to run; and both are made of gathers, products
and sums alone, which fuse when compiled and exist in every export format.

On a CPU, ``embedding_bag`` does each in one pass where nothing is compiled or
exported. Elsewhere groups, which are numbered by size, are summed in blocks:
after one gather that brings the members of a
group next to each other, all groups of one size are a contiguous block
``(groups, size)`` to sum over. Groups of each image are summed by a product
with their membership matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


_counting = False


@contextmanager
def counted_as_sums() -> Iterator[None]:
    """Context in which sums over groups of an image are not products.

    For counting operations: a product with a 0-1 matrix is how accelerators
    take such a sum, not what it costs, and a budget in operations should
    mean the same on all devices.
    """
    global _counting
    previous, _counting = _counting, True
    try:
        yield
    finally:
        _counting = previous


def counting() -> bool:
    """Whether inside :func:`counted_as_sums`."""
    return _counting


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


def image_sum(x: Tensor, position: Tensor, count: int) -> Tensor:
    """Sum of the members of each group, with groups of each image.

    Args:
        x (Tensor): (B, T, C).
        position (Tensor): Group of each token, int64, (B, T).
        count (int): Groups of each image; 0 is the sum of an empty one.

    Returns:
        Tensor: (B, count, C), in the dtype of x. Where it is a product,
        autocast to bf16 rounds the values, as it does in any product.
    """
    return _ImageSum.apply(x, position, count)


def image_gather(z: Tensor, position: Tensor) -> Tensor:
    """What each token's group holds; transpose of :func:`image_sum`.

    Args:
        z (Tensor): (B, groups, C).
        position (Tensor): Group of each token, int64, (B, T).

    Returns:
        Tensor: (B, T, C).
    """
    return _ImageGather.apply(z, position)


def image_sizes(x: Tensor, position: Tensor, count: int) -> Tensor:
    """Members of each group, (B, count, 1), in the dtype of x.

    Counted without rounding, whatever autocast does; above 256 bf16 rounds
    the count itself.
    """
    if _use_bags(x) or _counting:
        sizes = _flat(position, count).bincount(minlength=len(x) * count)
        return sizes.view(len(x), count, 1).to(x.dtype)
    return _member(position, count).sum(2, keepdim=True).to(x.dtype)


def _flat(position: Tensor, count: int) -> Tensor:
    """Groups of all images numbered through, (B * T,)."""
    image = torch.arange(len(position), device=position.device)
    return (position + count * image[:, None]).flatten()


def _member(position: Tensor, count: int) -> Tensor:
    """Which token is in which group, bool, (B, count, T)."""
    groups = torch.arange(count, device=position.device)
    return position.unsqueeze(1) == groups.unsqueeze(1)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Precision of sums by products: bf16 under autocast to it.

    Not fp16, in which the sum of a large group can overflow.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
        if wanted == torch.bfloat16:
            return wanted
    return x.dtype


def _image_sum(
    x: Tensor, position: Tensor, count: int, dtype: torch.dtype
) -> Tensor:
    """Sums in the dtype of x; products, if it takes any, in the given one."""
    if _use_bags(x):
        group, order = _flat(position, count).sort(stable=True)
        starts = torch.searchsorted(group, torch.arange(len(x) * count))
        rows = x.reshape(-1, x.shape[2])
        out = F.embedding_bag(order, rows, starts, mode='sum')
        return out.view(len(x), count, -1)
    if _counting:
        total = x.new_zeros(len(x), count, x.shape[2])
        return total.scatter_add(1, position.unsqueeze(2).expand_as(x), x)
    member, values = _member(position, count).to(dtype), x.to(dtype)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            total = member @ values
    else:
        total = member @ values
    return total.to(x.dtype)


def _image_gather(z: Tensor, position: Tensor) -> Tensor:
    rows = z.reshape(-1, z.shape[2])
    out = rows.index_select(0, _flat(position, z.shape[1]))
    return out.view(*position.shape, -1)


class _ImageSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, position, count):
        ctx.save_for_backward(position)
        return _image_sum(x, position, count, _product_dtype(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (position,) = ctx.saved_tensors
        return _image_gather(grad, position), None, None


class _ImageGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, position):
        ctx.save_for_backward(position)
        ctx.count, ctx.dtype = z.shape[1], _product_dtype(z)
        return _image_gather(z, position)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (position,) = ctx.saved_tensors
        return _image_sum(grad, position, ctx.count, ctx.dtype), None
