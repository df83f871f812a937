"""Which tokens of an image are similar, and which therefore merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compressor import Layer
from .merging import Merge

SKETCH = 64  # channels that tokens are compared in


def sketch_dims(dims: int) -> int:
    """The fewest channels >= 64 that C channels fold into evenly."""
    folds = max(dims // SKETCH, 1)
    while dims % folds:
        folds -= 1
    return dims // folds


def sketch(x: Tensor, signs: Tensor) -> Tensor:
    """Fold channels onto each other with random signs (a count sketch), which
    leaves scalar products as they were in expectation.

    Args:
        x (Tensor): (B, T, C).
        signs (Tensor): -1 or 1, (C,).

    Returns:
        Tensor: float32, (B, T, D), D as :func:`sketch_dims` says.
    """
    folded = (x * signs.to(x.dtype)).unflatten(
        2, (-1, sketch_dims(x.shape[2]))
    )
    return folded.sum(2, dtype=torch.float32)


class Comparison(NamedTuple):
    """Something that tokens are compared by.

    Attributes:
        find (Callable): From tokens (B, T, C), the layer they are for and
            the signs of sketches: (B, T, D).
        cost (Callable): From C and the channels of a key: D, and the MACs
            to find it of one token.
    """

    find: Callable[[Tensor, Layer, Tensor], Tensor]
    cost: Callable[[int, int], tuple[int, int]]


COMPARES = {
    'sketch': Comparison(
        lambda x, layer, signs: sketch(x, signs),
        lambda dims, key_dims: (sketch_dims(dims), dims),
    ),
    'keys': Comparison(
        lambda x, layer, signs: layer.mean_keys(x),
        lambda dims, key_dims: (key_dims, dims * key_dims),
    ),
    'tokens': Comparison(
        lambda x, layer, signs: x, lambda dims, key_dims: (dims, 0)
    ),
}


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


def all_rows(metric: Tensor, num_prefix: int) -> Tensor:
    """Numbers of all tokens of all images, (B, P+T), for (B, T, D)."""
    batch, tokens, _ = metric.shape
    rows = torch.arange(batch * (num_prefix + tokens), device=metric.device)
    return rows.view(batch, -1)


def merge_into(rows: Tensor, moved: Tensor, goal: Tensor) -> Merge:
    """The merge of some tokens into others; those stay in their order.

    Args:
        rows (Tensor): See :func:`all_rows`, int64, (B, P+T).
        moved (Tensor): Those that go, each once, (B, R).
        goal (Tensor): Where to, some that stay, (B, R).
    """
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
        kept, moved, into = kept.flatten(), moved.flatten(), into.flatten()
        return Merge(kept=kept, moved=moved, into=into, rows=place)
    # Each operator is a kernel or more: few count.
    flat, moved = rows.flatten(), moved.flatten()
    last = torch.iinfo(torch.int64).max  # a shape would be traced
    gone = flat.scatter(0, moved, last).view_as(rows)
    kept = gone.sort(dim=1).values[:, :left].flatten()
    place = flat.scatter(0, kept, after)
    into = place.index_select(0, goal.flatten())
    place = place.scatter(0, moved, into).view_as(rows)
    return Merge(kept=kept, moved=moved, into=into, rows=place)
