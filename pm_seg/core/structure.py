"""The paper's structures: which patch tokens form a group in which layer.

Found once, from scores: thresholds say which tokens are centres of groups and
which are pruned, windows in raster order who belongs to which centre (Mao et
al., arXiv 2503.23455, section 3.3; the windows are those of its code).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .merging import Grid

PRUNED = -1


def check_scores(scores: Tensor, layers: Sequence[int]) -> None:
    """Raise ``ValueError`` unless scores are finite, >= 0 and informative;
    one row (N,) for each of ``layers``."""
    for layer, row in zip(layers, scores):
        if not torch.isfinite(row).all():
            problem = (
                'contain NaN or inf; gather them again with a lower loss '
                'scale or without mixed precision'
            )
        elif (row < 0).any():
            problem = (
                f'contain {row.min().item():.3g}; scores must be >= 0 (take '
                'absolute values)'
            )
        elif not row.any():
            problem = (
                'are all zero: no gradient reached it; gather them on images '
                'with labels, through this layer'
            )
        else:
            continue
        raise ValueError(f'scores of layer {layer} {problem}')


def check_rates(keep_rate: float, prune_rate: float) -> None:
    """Raise ``ValueError`` unless both are shares, together at most 1."""
    if not isinstance(keep_rate, Real) or not 0 < keep_rate <= 1:
        raise ValueError(
            f'keep_rate={keep_rate!r} is not in (0, 1]; it is the share of '
            'patch tokens that a compressed layer works on, for example '
            'keep_rate=0.7'
        )
    if not isinstance(prune_rate, Real) or not 0 <= prune_rate < 1:
        raise ValueError(
            f'prune_rate={prune_rate!r} is not in [0, 1); it is the share of '
            'patch tokens that bypass a compressed layer, for example '
            'prune_rate=0.1'
        )
    if keep_rate + prune_rate > 1 + 1e-9:
        raise ValueError(
            f'keep_rate={keep_rate} + prune_rate={prune_rate} is above 1: a '
            'token cannot be kept and pruned; lower one of them'
        )


def count_groups(
    group: Tensor, layers: Sequence[int], expected: Sequence[int]
) -> list[int]:
    """Groups of each layer, (L, N), in those not compressed as many as
    tokens, or ``ValueError`` if they are not numbered 0..K-1, or not as many
    as ``expected`` of each compressed one, if any."""
    counts = [group.shape[1]] * len(group)
    for index, layer in enumerate(layers):
        used = group[layer].unique()
        used = used[used != PRUNED].tolist()
        counts[layer] = len(used)
        if not used or used != list(range(len(used))):
            raise ValueError(
                f'groups of layer {layer} must be numbered 0..K-1 without '
                f'gaps, K >= 1, and -1 where pruned; got {used[:8]}...'
            )
        if expected and expected[index] != len(used):
            raise ValueError(
                f'layer {layer} has {len(used)} groups, num_groups says '
                f'{expected[index]}; give as many, or leave num_groups out'
            )
    return counts


def normalise_scores(
    scores: Tensor, decay: float = 0.0, layers: Sequence[int] = ()
) -> Tensor:
    """L2-normalise each layer and weight it by its depth.

    Args:
        scores (Tensor): (L, N), >= 0, none all zero.
        decay (float): Layer l is multiplied by ``1 - decay * l``. The paper's
            classification models use 0.025, its Segmenter 0.
        layers (Sequence[int]): Layer l of each row. Defaults to 0..L-1.

    Returns:
        Tensor: (L, N).
    """
    index = torch.tensor(layers or range(len(scores)), dtype=scores.dtype)
    # Scaled by powers of 2, which rounds nothing: squares stay in range.
    scores = scores.ldexp(-scores.amax(1, keepdim=True).frexp().exponent)
    norm = scores.norm(dim=1, keepdim=True)
    return scores / norm * (1 - decay * index).unsqueeze(1)


def count_tokens(
    scores: Tensor,
    keep_rate: float,
    prune_rate: float = 0.0,
    threshold: str = 'layer',
) -> tuple[list[int], list[int]]:
    """Centres and live tokens of each layer, by thresholds on the scores.

    Args:
        scores (Tensor): Normalised scores, (L, N).
        keep_rate (float): Share of the tokens that become centres, in (0, 1].
        prune_rate (float): Share of the tokens that bypass the layer, in
            [0, 1). Defaults to 0.
        threshold (str): 'layer' for the same share in each layer (the
            paper's Segmenter), 'global' for one pair of thresholds over all
            layers, so that those whose tokens matter little keep few (its
            classifiers). Defaults to 'layer'.

    Returns:
        tuple[list[int], list[int]]: Centres of each layer, 0 where no score
        reaches a global threshold; all but the pruned tokens of each layer.
    """
    depth, tokens = scores.shape
    pool, rows = scores, 1
    if threshold == 'global':
        pool, rows = scores.reshape(1, -1), depth
    pool = pool.sort(dim=1).values
    keep, prune = int(tokens * keep_rate), int(tokens * prune_rate)
    high, low = pool[:, -max(keep * rows, 1)], pool[:, prune * rows]
    centres = (scores >= high.unsqueeze(1)).sum(1).tolist()
    live = (scores >= low.unsqueeze(1)).sum(1).tolist()
    return centres, live


def row_window_groups(centres: Tensor, grid: Grid) -> Tensor:
    """The release's groups: runs of tokens in raster order around a centre.

    The border between consecutive centres a < b is ``ceil((a + b) / 2)``,
    moved to a row start if it lies in a later row than ``a + 1``. (The
    release tests the row of ``a + 1``, not of ``a``; parity needs it.)

    Args:
        centres (Tensor): bool, (N,).
        grid (tuple[int, int]): Height and width, N = h * w.

    Returns:
        Tensor: Group of each token, in the order of centres, int64, (N,).
    """
    width, index = grid[1], centres.nonzero().flatten()
    first, second = index[:-1], index[1:]
    right = (first + second + 1) // 2
    row = (first + 1) // width
    right = torch.where(row < right // width, (row + 1) * width, right)
    tokens = torch.arange(centres.numel())
    return torch.searchsorted(right, tokens, right=True)


def make_groups(
    scores: Tensor, centres: Sequence[int], live: Sequence[int], grid: Grid
) -> Tensor:
    """Groups around the tokens with the highest scores (L, N), of equal ones
    the first: so many centres >= 1 and tokens that are not pruned, as centres
    never are, in each layer. Numbered 0..K-1, -1 if pruned, int64, (L, N)."""
    group = []
    for row, count, alive in zip(scores, centres, live):
        rank = row.argsort(descending=True, stable=True).argsort()
        windows = row_window_groups(rank < count, grid)
        group.append(windows.where(rank < max(alive, count), PRUNED))
    return torch.stack(group)


def group_weights(scores: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Initial merge and restore weights of one layer.

    ``m_n = s_n / (s_centre + 1e-8)``; the centre has the highest score of the
    group. r is the pseudo-inverse of the merge matrix, whose rows have
    disjoint supports: ``r_n = m_n / sum_{j in group} m_j^2``.

    Args:
        scores (Tensor): Normalised, (N,). Of a group of zeros all count alike.
        group (Tensor): Group of each token, -1 if pruned, int64, (N,).

    Returns:
        tuple[Tensor, Tensor]: m and r, (N,), 0 if pruned.
    """
    live, index = (group >= 0).to(scores.dtype), group.clamp_min(0)
    zeros = torch.zeros_like(scores)
    peak = zeros.scatter_reduce(0, index, scores * live, 'amax')[index]
    merge = live * torch.where(peak > 0, scores / (peak + 1e-8), 1.0)
    power = zeros.index_add(0, index, merge.square())[index]
    return merge, merge / power.clamp_min(torch.finfo(merge.dtype).tiny)
