"""Which tokens of an image are similar, and which therefore merge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .merging import Merge, rows_of

SKETCH = 64  # channels that tokens are compared in


def sketch_dims(dims: int) -> int:
    """The fewest channels >= 64 that C channels fold into evenly."""
    folds = max(dims // SKETCH, 1)
    while dims % folds:
        folds -= 1
    return dims // folds


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

    The bipartite matching of Bolya et al., "Token Merging: Your ViT But
    Faster", ICLR 2023.

    Every even token is paired with the odd token it differs least from, by
    ``(1 - cosine) * weight * weight of the other``. Several may go to one.

    Args:
        metric (Tensor): What tokens are compared by, float32, (B, T, D).
        count (int): Tokens that merge into others, at most T // 2.
        num_prefix (int): P.
        weight (Tensor, optional): How much it matters that a token stays
            alone, > 0, float32, (B, T). Defaults to 1.

    Returns:
        Merge: K = T - count; tokens stay in their order.
    """
    batch, tokens, _ = metric.shape
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
    # The rank of each even token, from most alone to most similar.
    rank = nearness.argsort(dim=-1).argsort(dim=-1)
    index = torch.arange(tokens, device=metric.device)
    chosen = torch.where(
        rank >= even.shape[1] - count, 2 * partner + 1, index[::2]
    )
    pairs = [chosen[:, : odd.shape[1]], index[1::2].expand(batch, -1)]
    target = torch.stack(pairs, dim=2).flatten(1)
    target = torch.cat([target, chosen[:, odd.shape[1] :]], dim=1)
    return merge_into(target, count, num_prefix)


def merge_into(target: Tensor, count: int, num_prefix: int = 0) -> Merge:
    """The merge of tokens into others, all in their order.

    Args:
        target (Tensor): Patch token that each one goes to: another, which
            stays, or itself, int64, (B, T).
        count (int): How many go to another.
        num_prefix (int): P.
    """
    if num_prefix:
        target = F.pad(target + num_prefix, (num_prefix, 0))
    batch, tokens = target.shape
    index = torch.arange(tokens, device=target.device)
    if num_prefix:
        target = torch.where(index < num_prefix, index, target)
    # Who stays first, in order, then who goes.
    order = torch.add(index, target != index, alpha=tokens).argsort(dim=1)
    place = order.argsort(dim=1).gather(1, target)
    kept, moved = order.split([tokens - count, count], dim=1)
    return Merge(
        kept=rows_of(kept, tokens),
        moved=rows_of(moved, tokens),
        into=rows_of(place.gather(1, moved), tokens - count),
        place=place,
    )
