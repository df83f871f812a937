"""Structures: which patch tokens form a group in which layer.

A *structure* is found once, from scores, and is the same for every image. It
has two parts: how many centres each layer has (thresholds on the scores),
and how the other tokens are distributed among them (a *builder*).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

Grid = tuple[int, int]
PRUNED = -1

WEIGHTS = ('score', 'mean')


def check_scores(scores: Tensor, layer_indices: Sequence[int] = ()) -> None:
    """Raise ``ValueError`` unless scores are finite, >= 0 and informative.

    Args:
        scores (Tensor): (L, N), one row for each layer.
        layer_indices (Sequence[int]): Block index of each row, for messages.
            Defaults to 0..L-1.
    """
    if scores.dim() != 2:
        raise ValueError(
            f'scores must have shape (layers, tokens), got '
            f'{tuple(scores.shape)}'
        )
    for layer, row in zip(layer_indices or range(len(scores)), scores):
        if not torch.isfinite(row).all():
            raise ValueError(
                f'scores of layer {layer} contain NaN or inf; gather them '
                'again with a lower loss scale or without mixed precision'
            )
        if (row < 0).any():
            raise ValueError(
                f'scores of layer {layer} contain {row.min().item():.3g}; '
                'scores must be >= 0 (take absolute values)'
            )
        if not (row > 0).any():
            raise ValueError(
                f'scores of layer {layer} are all zero: no gradient reached '
                'it; gather them on images with labels, through this layer'
            )


def check_rates(keep: float, prune: float) -> None:
    """Raise ``ValueError`` unless 0 < keep, 0 <= prune, keep + prune <= 1."""
    for name, value in (('keep', keep), ('prune', prune)):
        if not isinstance(value, Real):
            raise ValueError(
                f'{name}={value!r} is a {type(value).__name__}, expected a '
                f'number, for example {name}=0.1'
            )
    if not 0 < keep <= 1:
        raise ValueError(
            f'keep={keep} is not in (0, 1]; it is the share of patch tokens '
            'that a compressed block works on, for example keep=0.7'
        )
    if not 0 <= prune < 1:
        raise ValueError(
            f'prune={prune} is not in [0, 1); it is the share of patch '
            'tokens that bypass a compressed block, for example prune=0.1'
        )
    if keep + prune > 1 + 1e-9:
        raise ValueError(
            f'keep={keep} + prune={prune} is above 1: a token cannot be kept '
            'and pruned; lower one of them'
        )


def normalise_scores(
    scores: Tensor, decay: float = 0.0, layer_indices: Sequence[int] = ()
) -> Tensor:
    """L2-normalise each layer and weight it by its depth.

    Args:
        scores (Tensor): (L, N), >= 0.
        decay (float): Layer l is multiplied by ``1 - decay * l``. The paper's
            classification models use 0.025, its Segmenter 0.
        layer_indices (Sequence[int]): Block index l of each row. Defaults to
            0..L-1.

    Returns:
        Tensor: (L, N).
    """
    index = torch.as_tensor(
        list(layer_indices) or range(len(scores)), dtype=scores.dtype
    )
    norm = scores.norm(dim=1, keepdim=True)
    return scores / norm * (1 - decay * index).unsqueeze(1)


def count_tokens(
    scores: Tensor, keep: float, prune: float, budget: str = 'global'
) -> tuple[list[int], list[int]]:
    """Centres and live tokens of each layer, by score thresholds.

    With budget='global' (the paper, section 3.3) one pair of thresholds
    is set over all layers together, so that layers whose tokens matter little
    keep few of them; with 'layer' each layer keeps the same share.

    Args:
        scores (Tensor): Normalised scores, (L, N).
        keep (float): Share of the tokens that become centres, in (0, 1].
        prune (float): Share of the tokens that bypass the block, in [0, 1).
        budget (str): 'global' or 'layer'.

    Returns:
        tuple[list[int], list[int]]: Centres per layer, 0 where no score
        reaches a global threshold; centres and merged tokens (all but the
        pruned ones) per layer.

    Raises:
        ValueError: On rates out of range.
    """
    check_rates(keep, prune)
    num_layers, num_tokens = scores.shape
    num_keep = int(num_tokens * keep)
    num_prune = int(num_tokens * prune)
    if budget == 'global':
        pool = scores.flatten().sort().values
        low = pool[num_prune * num_layers]
        high = pool[-max(num_keep * num_layers, 1)]
        low, high = low.expand(num_layers), high.expand(num_layers)
    elif budget == 'layer':
        pool = scores.sort(dim=1).values
        low, high = pool[:, num_prune], pool[:, -max(num_keep, 1)]
    else:
        raise ValueError(
            f"budget={budget!r} is no threshold; choose 'global' or 'layer'"
        )
    centres = (scores >= high[:, None]).sum(1).tolist()
    live = (scores >= low[:, None]).sum(1).tolist()
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
        Tensor: Group of each token, numbered in the order of the centres,
        int64, (N,).
    """
    width = grid[1]
    index = centres.nonzero().flatten()
    first, second = index[:-1], index[1:]
    right = (first + second + 1) // 2
    row = (first + 1) // width
    right = torch.where(row < right // width, (row + 1) * width, right)
    tokens = torch.arange(centres.numel())
    return torch.searchsorted(right, tokens, right=True)


def nearest_centre_groups(centres: Tensor, grid: Grid) -> Tensor:
    """Voronoi groups: each token joins its nearest centre in 2-D.

    An exact separable distance transform: nearest centre within the column,
    then over the columns of the row, nearest columns first and no farther
    than the worst distance so far; time O(N) times that distance, memory
    O(N). Ties go to the column on the left, in a column to the centre above.

    Args:
        centres (Tensor): bool, (N,), at least one set.
        grid (tuple[int, int]): Height and width, N = h * w.

    Returns:
        Tensor: Group of each token, numbered in raster order of the centres,
        int64, (N,).
    """
    height, width = grid
    far = height + width
    mask = centres.view(height, width)
    rows = torch.arange(height).unsqueeze(1).expand(height, width)
    above = torch.where(mask, rows, -far).cummax(0).values
    below = torch.where(mask, rows, height + far).flip(0).cummin(0).values
    below = below.flip(0)
    nearest = torch.where(rows - above <= below - rows, above, below)
    vertical = (nearest - rows).square()  # (h, w), large without a centre
    # Distance first, then column: the smallest of these is the nearest.
    key = vertical * width + torch.arange(width)
    best = key.clone()
    for offset in range(1, width):
        step = offset**2 * width
        if step > best.max():
            break
        right, left = best[:, offset:], best[:, :-offset]
        torch.minimum(right, key[:, :-offset] + step, out=right)
        torch.minimum(left, key[:, offset:] + step, out=left)
    column = best % width  # (h, w)
    row = nearest.gather(1, column)
    number = centres.long().cumsum(0) - 1
    return number[(row * width + column).flatten()]


Builder = Callable[[Tensor, Grid], Tensor]
BUILDERS: dict[str, Builder] = {
    'row_window': row_window_groups,
    'nearest_centre': nearest_centre_groups,
}


def build_groups(
    centres: Tensor, live: Tensor, grid: Grid, builder: str
) -> Tensor:
    """Groups of one layer.

    Args:
        centres (Tensor): bool, (N,), at least one set.
        live (Tensor): Tokens that are not pruned, bool, (N,); all centres
            are.
        grid (tuple[int, int]): Height and width, N = h * w.
        builder (str): A key of ``BUILDERS``.

    Returns:
        Tensor: Group of each token, -1 if pruned, int64, (N,).

    Raises:
        ValueError: On an unknown builder, no centre, or a pruned centre.
    """
    if builder not in BUILDERS:
        raise ValueError(
            f'builder={builder!r} is unknown; choose one of {tuple(BUILDERS)}'
        )
    if not centres.any() or (centres & ~live).any():
        raise ValueError(
            f'got {int(centres.sum())} centres, {int((centres & ~live).sum())}'
            ' of them pruned; expected at least one, and none pruned'
        )
    return torch.where(live, BUILDERS[builder](centres, grid), PRUNED)


def sum_by_group(values: Tensor, group: Tensor) -> Tensor:
    """Sum of ``values`` over each token's group, 0 if pruned, (N,)."""
    live = group >= 0
    slot = group.clamp_min(0)
    total = values.new_zeros(values.numel())
    total.index_add_(0, slot, values * live)
    return total[slot] * live


def group_weights(
    scores: Tensor, group: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Initial merge and restore weights of one layer.

    Args:
        scores (Tensor): (N,).
        group (Tensor): Group of each token, -1 if pruned, int64, (N,).
        kind (str): 'score' for ``m_n = s_n / s_centre`` (the release; the
            centre is the member with the highest score), 'mean' for
            ``m_n = 1 / size``.

    Returns:
        tuple[Tensor, Tensor]: m and r, (N,). r is the pseudo-inverse of the
        merge matrix, ``r_n = m_n / sum_{j in group} m_j^2`` (1 for 'mean').
    """
    live = (group >= 0).to(scores.dtype)
    if kind == 'mean':
        merge = live / sum_by_group(live, group).clamp_min(1)
    elif kind == 'score':
        peak = scores.new_zeros(scores.numel())
        slot = group.clamp_min(0)
        peak.scatter_reduce_(0, slot, scores * live, 'amax')
        merge = live * scores / (peak[slot] + 1e-8)
    else:
        raise ValueError(
            f'weights={kind!r} is unknown; choose one of {WEIGHTS}'
        )
    power = sum_by_group(merge.square(), group)
    restore = merge / power.clamp_min(torch.finfo(merge.dtype).tiny)
    return merge, restore
