"""The paper's structures: which patch tokens form a group in which layer.

A *structure* is found once, from scores, and is the same for every image:
thresholds on the scores say which tokens are centres of groups and which are
pruned, windows in raster order say who belongs to which centre (Mao et al.,
arXiv 2503.23455, section 3.3; the windows are those of its code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from .merging import Grid
from .schedule import solve

PRUNED = -1
THRESHOLDS = ('global', 'layer')
WEIGHTS = ('score', 'mean')


def check_scores(scores: Tensor, layer_indices: Sequence[int] = ()) -> None:
    """Raise ``ValueError`` unless scores are finite, >= 0 and informative.

    Args:
        scores (Tensor): (L, N), one row for each layer.
        layer_indices (Sequence[int]): Layer of each row, for messages.
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


def check_rates(keep_rate: float, prune_rate: float) -> None:
    """Raise ``ValueError`` unless both are shares, together at most 1."""
    for name, value in (('keep_rate', keep_rate), ('prune_rate', prune_rate)):
        if not isinstance(value, Real):
            raise ValueError(
                f'{name}={value!r} is a {type(value).__name__}, expected a '
                f'number, for example {name}=0.1'
            )
    if not 0 < keep_rate <= 1:
        raise ValueError(
            f'keep_rate={keep_rate} is not in (0, 1]; it is the share of '
            'patch tokens that a compressed layer works on, for example '
            'keep_rate=0.7'
        )
    if not 0 <= prune_rate < 1:
        raise ValueError(
            f'prune_rate={prune_rate} is not in [0, 1); it is the share of '
            'patch tokens that bypass a compressed layer, for example '
            'prune_rate=0.1'
        )
    if keep_rate + prune_rate > 1 + 1e-9:
        raise ValueError(
            f'keep_rate={keep_rate} + prune_rate={prune_rate} is above 1: a '
            'token cannot be kept and pruned; lower one of them'
        )


def check_layers(
    layers: Sequence[int] | None, depth: int, decay: float
) -> tuple[int, ...]:
    """Layers to compress, all if None, ascending.

    Raises:
        ValueError: If there are none, or not in the model, or ``decay``
            leaves nothing of their scores.
    """
    chosen = sorted({*map(int, range(depth) if layers is None else layers)})
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < depth:
        raise ValueError(
            f'layers={list(layers)} must name at least one of the layers '
            f'0..{depth - 1}, and no others'
        )
    if not 0 <= decay * chosen[-1] < 1:
        raise ValueError(
            f'decay={decay} leaves layer {chosen[-1]} '
            f'{1 - decay * chosen[-1]:.3g} of its scores, expected a share in '
            '(0, 1]; lower decay, for example to 0.025, but not below 0'
        )
    return tuple(chosen)


def check_groups(
    group: Tensor, layers: Sequence[int], num_groups: Sequence[int] | None
) -> None:
    """Raise ``ValueError`` unless groups are numbered as they should.

    Args:
        group (Tensor): Group of each token, -1 if pruned, int64, (L, N).
        layers (Sequence[int]): Layers to look at.
        num_groups (Sequence[int], optional): Groups they must have.
    """
    for layer, count in zip(layers, num_groups or [None] * len(layers)):
        used = group[layer].unique()
        used = used[used != PRUNED].tolist()
        if not used or used != list(range(len(used))):
            raise ValueError(
                f'groups of layer {layer} must be numbered 0..K-1 without '
                f'gaps, K >= 1, and -1 where pruned; got {used[:8]}...'
            )
        if count not in (None, len(used)):
            raise ValueError(
                f'layer {layer} has {len(used)} groups, num_groups says '
                f'{count}; give as many, or leave num_groups out'
            )


def normalise_scores(
    scores: Tensor, decay: float = 0.0, layer_indices: Sequence[int] = ()
) -> Tensor:
    """L2-normalise each layer and weight it by its depth.

    Args:
        scores (Tensor): (L, N), >= 0, none all zero.
        decay (float): Layer l is multiplied by ``1 - decay * l``. The paper's
            classification models use 0.025, its Segmenter 0.
        layer_indices (Sequence[int]): Layer l of each row. Defaults to
            0..L-1.

    Returns:
        Tensor: (L, N).
    """
    index = torch.as_tensor(
        list(layer_indices) or range(len(scores)), dtype=scores.dtype
    )
    # Scaled by powers of 2, which rounds nothing: squares stay in range.
    exponent = scores.amax(1, keepdim=True).frexp().exponent
    scores = scores.ldexp(-exponent)
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
        reaches a global threshold; centres and merged tokens (all but the
        pruned ones) of each layer.

    Raises:
        ValueError: On rates out of range.
    """
    check_rates(keep_rate, prune_rate)
    num_layers, num_tokens = scores.shape
    num_keep = int(num_tokens * keep_rate)
    num_prune = int(num_tokens * prune_rate)
    if threshold == 'global':
        pool = scores.flatten().sort().values
        low = pool[num_prune * num_layers]
        high = pool[-max(num_keep * num_layers, 1)]
        low, high = low.expand(num_layers), high.expand(num_layers)
    elif threshold == 'layer':
        pool = scores.sort(dim=1).values
        low, high = pool[:, num_prune], pool[:, -max(num_keep, 1)]
    else:
        raise ValueError(
            f'threshold={threshold!r} is unknown; choose one of {THRESHOLDS}'
        )
    centres = (scores >= high[:, None]).sum(1).tolist()
    live = (scores >= low[:, None]).sum(1).tolist()
    return centres, live


def find_keep_rate(
    share: Callable[[list[int]], float],
    scores: Tensor,
    keep: float,
    prune_rate: float = 0.0,
    threshold: str = 'layer',
) -> float:
    """The highest ``keep_rate`` that costs no more than a share.

    Args:
        share (Callable): Cost of the layers with so many centres, as a share
            of the dense layers'.
        keep (float): The share it may be.
        scores, prune_rate, threshold: See :func:`count_tokens`.

    Raises:
        ValueError: If the lowest rate costs more.
    """
    # One centre in each layer at least.
    least, most = 0.5 / scores.shape[1], 1 - prune_rate

    def cost(rate: list[float]) -> float:
        return share(count_tokens(scores, *rate, prune_rate, threshold)[0])

    def rates(strength: float) -> list[float]:
        return [most - (most - least) * strength]

    try:  # shares are sums of floats
        return solve(rates, cost, keep + 1e-9, most=1.0)[0]
    except ValueError as error:
        raise ValueError(
            f'keep={keep} is out of reach: of the operations of all layers '
            f'{error}, with one group in each compressed layer; keep more, or '
            'compress more layers'
        ) from None


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


def make_groups(
    scores: Tensor,
    centres: Sequence[int],
    live: Sequence[int],
    grid: Grid,
) -> Tensor:
    """Groups around the tokens with the highest scores.

    Args:
        scores (Tensor): (L, N). Of equal ones the first count as higher.
        centres (Sequence[int]): Groups of each layer, K >= 1.
        live (Sequence[int]): Tokens that are not pruned, >= K.
        grid (tuple[int, int]): Height and width, N = h * w.

    Returns:
        Tensor: Group of each token, 0..K-1, -1 if pruned, int64, (L, N).
    """
    group = torch.full(scores.shape, PRUNED)
    for row, count, alive, members in zip(scores, centres, live, group):
        rank = row.argsort(descending=True, stable=True).argsort()
        windows = row_window_groups(rank < count, grid)
        members.copy_(torch.where(rank < alive, windows, PRUNED))
    return group


def resize_groups(group: Tensor, scores: Tensor, grid: Grid) -> Tensor:
    """Groups on another grid: as many per token as on the native one.

    Args:
        group (Tensor): Groups on the native one, -1 if pruned, int64, (L, N).
        scores (Tensor): Scores on the other one, (L, N').
        grid (tuple[int, int]): Its height and width, N' = h' * w'.

    Returns:
        Tensor: As :func:`make_groups`, (L, N').
    """
    tokens, share = scores.shape[1], scores.shape[1] / group.shape[1]
    centres, live = [], []
    for row in group:
        count = round((int(row.max()) + 1) * share)
        alive = round(int((row != PRUNED).sum()) * share)
        centres.append(min(max(count, 1), tokens))
        live.append(min(max(alive, centres[-1]), tokens))
    return make_groups(scores, centres, live, grid)


def group_weights(
    scores: Tensor, group: Tensor, kind: str = 'score'
) -> tuple[Tensor, Tensor]:
    """Initial merge and restore weights of one layer.

    Args:
        scores (Tensor): Normalised, (N,). Of a group of zeros all count
            alike.
        group (Tensor): Group of each token, -1 if pruned, int64, (N,).
        kind (str): 'score' for ``m_n = s_n / (s_centre + 1e-8)`` (the
            release; the centre has the highest score of the group), 'mean'
            for ``m_n = 1 / size``. Defaults to 'score'.

    Returns:
        tuple[Tensor, Tensor]: m and r, (N,), 0 if pruned. r is the
        pseudo-inverse of the merge matrix, whose rows have disjoint supports:
        ``r_n = m_n / sum_{j in group} m_j^2`` (1 for 'mean').
    """
    live = (group >= 0).to(scores.dtype)
    if kind == 'mean':
        merge = live / _sum_by_group(live, group).clamp_min(1)
    elif kind == 'score':
        index = group.clamp_min(0)
        peak = torch.zeros_like(scores)
        peak = peak.scatter_reduce(0, index, scores * live, 'amax')[index]
        ratio = scores / (peak + 1e-8)
        merge = live * torch.where(peak > 0, ratio, 1.0)
    else:
        raise ValueError(
            f'weights={kind!r} is unknown; choose one of {WEIGHTS}'
        )
    power = _sum_by_group(merge.square(), group)
    return merge, merge / power.clamp_min(torch.finfo(merge.dtype).tiny)


def _sum_by_group(values: Tensor, group: Tensor) -> Tensor:
    """Sum of ``values``, 0 if pruned, over each token's group, (N,)."""
    index = group.clamp_min(0)
    return torch.zeros_like(values).index_add(0, index, values)[index]
