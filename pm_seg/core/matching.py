"""Which tokens of an image are similar, and their averages."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .segments import counting, image_sum
from .structure import Grid

WINDOW = 4  # tokens of a 2x2 window
SKETCH = 64  # channels that tokens are compared in
NEIGHBOURS = 9  # groups that a token can move to
_LARGE = 2**18  # on a CPU, temporary values of 9 times that are slow


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


def sketch_dims(dims: int) -> int:
    """The fewest channels >= 64 that C channels fold into evenly."""
    folds = max(dims // SKETCH, 1)
    while dims % folds:
        folds -= 1
    return dims // folds


@torch.no_grad()
def sketch(x: Tensor, signs: Tensor) -> Tensor:
    """Fold channels onto each other with random signs (a count sketch).

    Scalar products stay what they were in expectation, at a fraction of
    the cost.

    Args:
        x (Tensor): (B, T, C).
        signs (Tensor): -1 or 1, (C,).

    Returns:
        Tensor: float32, (B, T, D), D as :func:`sketch_dims` says.
    """
    dims = x.shape[2]
    folded = (x * signs.to(x.dtype)).unflatten(2, (-1, sketch_dims(dims)))
    return folded.sum(2, dtype=torch.float32)


def neighbours(slot: Tensor, count: int, grid: Grid) -> Tensor:
    """Groups around each token: its own and those of 8 points around it.

    The points are as far away as groups are wide on average.

    Args:
        slot (Tensor): Group of each token, int64, (N,).
        count (int): Number of groups.
        grid (tuple[int, int]): Height and width, N = h * w.

    Returns:
        Tensor: int64, (N, 9), the own group in the middle.
    """
    height, width = grid
    step = max(round((height * width / count) ** 0.5), 1)
    offsets = torch.tensor([-step, 0, step])
    rows = (torch.arange(height)[:, None] + offsets).clamp(0, height - 1)
    columns = (torch.arange(width)[:, None] + offsets).clamp(0, width - 1)
    points = rows[:, None, :, None] * width + columns[None, :, None, :]
    return slot[points.flatten(2).flatten(0, 1)]


@torch.no_grad()
def assign(
    metric: Tensor, seeds: Tensor, candidates: Tensor, rounds: int
) -> Tensor:
    """Move each token to the most similar of the groups around it.

    Spherical k-means with a limited reach, as superpixels are found (Achanta
    et al., "SLIC Superpixels", PAMI 2012): in each round tokens go to the
    group whose sum has the highest cosine with them, and sums are taken anew.

    Args:
        metric (Tensor): float32, (B, N, D).
        seeds (Tensor): Sums of the groups to start from, (B, K, D).
        candidates (Tensor): Groups a token can go to, int64, (N, J).
        rounds (int): At least 1.

    Returns:
        Tensor: Group of each token, int64, (B, N). Groups can be empty.
    """
    position = _nearest(metric, seeds, candidates)
    for _ in range(rounds - 1):
        seeds = image_sum(metric, position, seeds.shape[1])
        position = _nearest(metric, seeds, candidates)
    return position


def _compare_all(metric: Tensor) -> bool:
    """Whether one product with all groups beats nine gathers.

    On accelerators it should (by the memory it touches, not measured): it is
    a small product, and the gathers write nine times the tokens. Compiled,
    they write nothing.
    """
    if counting() or torch.compiler.is_compiling():
        return False
    return metric.device.type != 'cpu'


def _nearest(metric: Tensor, seeds: Tensor, candidates: Tensor) -> Tensor:
    seeds = F.normalize(seeds, dim=-1)
    near = candidates.expand(len(metric), -1, -1)
    if _compare_all(metric):
        similarity = (metric @ seeds.mT).gather(2, near)
    elif metric.device.type == 'cpu' and metric.numel() > _LARGE:
        similarity = torch.stack(
            [
                (seeds.index_select(1, group) * metric).sum(-1)
                for group in candidates.unbind(1)
            ],
            dim=-1,
        )
    else:
        around = seeds.index_select(1, candidates.flatten())
        around = around.unflatten(1, candidates.shape)
        similarity = (around * metric.unsqueeze(2)).sum(-1)  # (B, N, J)
    choice = similarity.argmax(-1, keepdim=True)
    return near.gather(2, choice).squeeze(2)
