"""Which tokens of an image are similar, and which therefore merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .merging import Grid, Merge

SKETCH = 64  # channels that tokens are compared in
COMPONENTS = 32  # the same, where calibration found the best ones
WINDOW = 4  # tokens of a window

#: Channels that tokens are compared in, and the MACs to find them of one, for
#: C channels and those of a key.
COMPARES = {
    'sketch': lambda dims, key_dims: (sketch_dims(dims), dims),
    'keys': lambda dims, key_dims: (key_dims, dims * key_dims),
    'tokens': lambda dims, key_dims: (dims, 0),
    'components': lambda dims, key_dims: (
        min(COMPONENTS, dims),
        min(COMPONENTS, dims) * dims,
    ),
}


def sketch_dims(dims: int) -> int:
    """The fewest channels >= 64 that C channels fold into evenly."""
    folds = max(dims // SKETCH, 1)
    while dims % folds:
        folds -= 1
    return dims // folds


def random_signs(dims: int) -> Tensor:
    """-1 or 1, (C,), the same ones in each process."""
    seeded = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (dims,), generator=seeded, device='cpu')
    return 2.0 * signs - 1


def sketch(x: Tensor, signs: Tensor) -> Tensor:
    """Fold channels onto each other with random signs (a count sketch), which
    leaves scalar products as they were in expectation.

    (B, T, C) by -1 or 1, (C,) -> float32, (B, T, D), D by
    :func:`sketch_dims`.
    """
    folded = (x * signs.to(x.dtype)).unflatten(
        2, (-1, sketch_dims(x.shape[2]))
    )
    return folded.sum(2, dtype=torch.float32)


def match(
    metric: Tensor,
    count: int,
    num_prefix: int = 0,
    weight: Tensor | None = None,
) -> Merge:
    """Merge the ``count`` most similar pairs of an even and an odd token.

    Every even token is paired with the odd token it differs least from, by
    ``(1 - cosine) * weight * weight of the other``; several may go to one
    (the bipartite matching of Bolya et al., "Token Merging: Your ViT But
    Faster", ICLR 2023).

    Args:
        metric (Tensor): What tokens are compared by, float32, (B, T, D).
        count (int): Tokens that merge into others, at most T // 2.
        num_prefix (int): P.
        weight (Tensor, optional): How much it matters that a token stays
            alone, > 0, float32, (B, T). Defaults to 1.

    Returns:
        Merge: K = T - count; tokens stay in their order.
    """
    unit = F.normalize(metric, dim=-1)
    even, odd = unit[:, ::2], unit[:, 1::2]
    if weight is None:
        nearness, partner = (even @ odd.mT).max(dim=-1)
    else:
        even_weight, odd_weight = weight[:, ::2], weight[:, 1::2]
        odd = odd * odd_weight.unsqueeze(-1)
        difference = torch.baddbmm(
            odd_weight.unsqueeze(1), even, odd.mT, alpha=-1
        )
        difference, partner = difference.min(dim=-1)
        nearness = -difference * even_weight
    # From most alone to most similar.
    source = nearness.argsort(dim=-1)[:, even.shape[1] - count :]
    partner = partner.gather(1, source)
    rows = all_rows(metric, num_prefix)
    patches = rows[:, num_prefix:]
    return merge_into(
        rows, patches[:, ::2].gather(1, source),
        patches[:, 1::2].gather(1, partner),
    )  # fmt: skip


def match_windows(
    metric: Tensor, count: int, grid: Grid, num_prefix: int = 0
) -> Merge:
    """ALGM's local merge: the ``count`` most uniform 2x2 windows.

    Norouzi et al., "ALGM: Adaptive Local-then-Global Token Merging for
    Efficient Semantic Segmentation with Plain Vision Transformers", CVPR
    2024; other than there each image merges equally many, which is what
    allows batches and comparisons at equal cost.

    Args:
        metric (Tensor): (B, h * w, D), float32. The similarity of a window is
            the mean cosine of its pairs.
        count (int): Windows to merge, at most (h // 2) * (w // 2); an odd
            last row or column is never merged.
        grid (tuple[int, int]): h and w.
        num_prefix (int): P.

    Returns:
        Merge: K = h * w - 3 * count.
    """
    height, width = grid
    index = torch.arange(height * width, device=metric.device)
    index = index.view(height, width)
    index = index[: height // 2 * 2, : width // 2 * 2]
    index = index.unflatten(0, (-1, 2)).unflatten(2, (-1, 2))
    index = index.transpose(1, 2).reshape(-1, WINDOW)  # (windows, 4)
    unit = F.normalize(metric, dim=-1)
    total = unit[:, index.flatten()].unflatten(1, (-1, WINDOW)).sum(2)
    chosen = total.square().sum(-1).topk(count, dim=1).indices
    members = index[chosen]  # (B, count, 4)
    first = members[:, :, :1].expand(-1, -1, WINDOW - 1)
    rows = all_rows(metric, num_prefix)
    moved, goal = (
        rows[:, num_prefix:].gather(1, part.flatten(1))
        for part in (members[:, :, 1:], first)
    )
    return merge_into(rows, moved, goal)


def all_rows(metric: Tensor, num_prefix: int) -> Tensor:
    """Numbers of all tokens of all images, (B, P+T), for (B, T, D)."""
    batch, tokens, _ = metric.shape
    rows = torch.arange(batch * (num_prefix + tokens), device=metric.device)
    return rows.view(batch, -1)


def merge_into(rows: Tensor, moved: Tensor, goal: Tensor) -> Merge:
    """The merge of some tokens, each once, into some that stay in their
    order; by their numbers among :func:`all_rows`, (B, R) each."""
    left = rows.shape[1] - moved.shape[1]
    after = torch.arange(len(rows) * left, device=rows.device)
    if torch.compiler.is_compiling():  # without what exports may lack
        gone = (rows.unsqueeze(2) == moved.unsqueeze(1)).any(2)
        gone = torch.where(gone, rows.numel(), rows)
        kept = gone.sort(dim=1).values[:, :left]
        # Each token's place among those that stay, then those that go.
        order = torch.cat([kept, moved], 1).argsort(dim=1)
        after = after.view(-1, left)
        into = order.gather(1, goal - rows[:, :1]) + after[:, :1]
        place = torch.cat([after, into], 1).gather(1, order)
        return Merge(kept.flatten(), moved.flatten(), into.flatten(), place)
    # Each operator is a kernel or more: few count.
    flat, moved = rows.flatten(), moved.flatten()
    last = torch.iinfo(torch.int64).max  # a shape would be traced
    gone = flat.scatter(0, moved, last).view_as(rows)
    kept = gone.sort(dim=1).values[:, :left].flatten()
    place = flat.scatter(0, kept, after)
    into = place.index_select(0, goal.flatten())
    place = place.scatter(0, moved, into).view_as(rows)
    return Merge(kept, moved, into, place)
