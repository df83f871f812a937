"""Which tokens of an image are similar, and their averages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .structure import Grid

WINDOW = 4  # tokens of a 2x2 window


def match(metric: Tensor, count: int) -> Tensor:
    """ToMe's bipartite soft matching.

    Even tokens are matched with their most similar odd one; the ``count``
    most similar pairs merge.

    Args:
        metric (Tensor): (B, T, D); similarity is the cosine.
        count (int): At most T // 2.

    Returns:
        Tensor: New position of each token, below T - count, int64, (B, T).
    """
    metric = F.normalize(metric, dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].mT
    best, partner = similarity.max(dim=-1)
    even, odd = similarity.shape[1:]
    order = best.argsort(dim=-1, descending=True)
    merged, kept = order.split([count, even - count], dim=1)
    position = metric.new_empty(metric.shape[:2], dtype=torch.long)
    evens = torch.empty_like(partner)
    ranks = torch.arange(even - count, device=metric.device)
    evens.scatter_(1, kept, ranks.expand_as(kept))
    partners = partner.gather(1, merged) + (even - count)
    evens.scatter_(1, merged, partners)
    position[:, ::2] = evens
    position[:, 1::2] = torch.arange(odd, device=metric.device) + even - count
    return position


def match_windows(x: Tensor, grid: Grid, count: int) -> Tensor:
    """ALGM's local matching: the ``count`` most uniform 2x2 windows merge.

    Args:
        x (Tensor): Patch tokens, (B, h * w, C). The similarity of a window
            is the mean cosine of its pairs.
        grid (tuple[int, int]): h and w; an odd last row or column is never
            merged.
        count (int): At most (h // 2) * (w // 2).

    Returns:
        Tensor: New position of each token, below N - 3 * count, (B, N).
    """
    height, width = grid
    rows, columns = height // 2, width // 2
    batch = len(x)
    unit = F.normalize(x, dim=-1).view(batch, height, width, -1)
    unit = unit[:, : 2 * rows, : 2 * columns]
    total = unit.unflatten(1, (rows, 2)).unflatten(3, (columns, 2)).sum((2, 4))
    similarity = total.square().sum(-1).flatten(1)  # 4 + 2 * pairs
    chosen = similarity.topk(count, dim=1).indices
    number = similarity.new_full(similarity.shape, -1, dtype=torch.long)
    ranks = torch.arange(count, device=x.device)
    number.scatter_(1, chosen, ranks.expand_as(chosen))
    number = number.view(batch, rows, columns)
    number = number.repeat_interleave(2, 1).repeat_interleave(2, 2)
    pad = (0, width - 2 * columns, 0, height - 2 * rows)
    number = F.pad(number, pad, value=-1).flatten(1)
    alone = number < 0
    return torch.where(alone, alone.long().cumsum(1) - 1 + count, number)


def pool(
    x: Tensor, size: Tensor, position: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Average tokens that go to the same position, weighted by size.

    Args:
        x (Tensor): (B, T, C).
        size (Tensor): Patches each token stands for, (B, T, 1).
        position (Tensor): int64, (B, T).
        count (int): Number of positions.

    Returns:
        tuple[Tensor, Tensor]: Tokens (B, count, C) and sizes (B, count, 1).
    """
    position = position.unsqueeze(-1)
    total = x.new_zeros(len(x), count, x.shape[2])
    total = total.scatter_add(1, position.expand_as(x), x * size)
    sizes = size.new_zeros(len(x), count, 1).scatter_add(1, position, size)
    return total / sizes, sizes


@torch.no_grad()
def match_down(x: Tensor, count: int) -> Tensor:
    """Groups of similar tokens, by as many matchings as it takes.

    One matching can at most halve the number of tokens; groups of the first
    are matched again as single tokens, their means.

    Args:
        x (Tensor): (B, T, C).
        count (int): Groups wanted, 1..T.

    Returns:
        Tensor: Group of each token, 0..count-1, int64, (B, T).
    """
    batch, left, _ = x.shape
    place = torch.arange(left, device=x.device).expand(batch, -1)
    size = x.new_ones(batch, left, 1)
    while left > count:
        merged = min(left - count, left // 2)
        left -= merged
        position = match(x, merged)
        place = position.gather(1, place)
        if left > count:
            x, size = pool(x, size, position, left)
    return place
