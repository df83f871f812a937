"""Which tokens become the centres of groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .structure import Grid

CENTRES = ('score', 'spread')


def top_mask(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` highest scores, ties included, (N,) bool."""
    return scores >= scores.sort(descending=True).values[count - 1]


def spread_mask(
    weight: Tensor, count: int, grid: Grid, rng: np.random.Generator
) -> Tensor:
    """Centres spread evenly over the grid, denser where weights are high.

    Weighted farthest-point sampling: take the token with the largest
    ``weight * distance to the nearest centre so far``, 5 % jitter, until
    there are ``count``. A new centre updates its surroundings only, and the
    largest value is looked up by rows: the time of a centre hardly depends on
    the size of the grid.

    Args:
        weight (Tensor): (N,), >= 0; tokens of weight 0 come last.
        count (int): Centres wanted, at most N.
        grid (tuple[int, int]): Height and width, N = h * w.
        rng (np.random.Generator): Source of the jitter.

    Returns:
        Tensor: bool, (N,), ``count`` of them set.
    """
    height, width = grid
    if count == height * width:
        return torch.ones(count, dtype=torch.bool)
    gain = weight.double().numpy() * rng.uniform(0.95, 1.05, weight.numel())
    gain = (gain**2).reshape(grid)  # distances are squared: they rank alike
    nearest = np.full(grid, float((height + width) ** 2))
    merit = gain * nearest
    peaks = merit.max(1)
    rows, columns = np.arange(height)[:, None], np.arange(width)
    chosen = np.zeros(grid, bool)
    reach, renewal = height + width, 15
    for number in range(count):
        row = int(peaks.argmax())
        column = int(merit[row].argmax())
        chosen[row, column] = True
        gain[row, column] = -1.0
        # A centre changes nothing farther away than the largest distance of
        # a token that can still be chosen.
        if number == renewal:
            farthest = nearest.max(where=gain > 0, initial=1)
            reach = int(farthest**0.5) + 1
            renewal += max(number // 8, 16)
        top, left = max(row - reach, 0), max(column - reach, 0)
        band = slice(top, row + reach + 1)
        window = band, slice(left, column + reach + 1)
        distance = (rows[band] - row) ** 2
        distance = distance + (columns[window[1]] - column) ** 2
        near = np.minimum(nearest[window], np.maximum(distance, 1))
        nearest[window] = near
        merit[window] = gain[window] * near
        peaks[band] = merit[band].max(1)
    return torch.from_numpy(chosen.reshape(-1))


def select_centres(
    scores: Tensor,
    counts: Sequence[int],
    live: Tensor,
    grid: Grid,
    kind: str = 'score',
    power: float = 1.0,
    seed: int = 0,
    rotate: bool = True,
) -> Tensor:
    """Centres of every token map.

    'score' takes the tokens with the highest scores (the paper). 'spread'
    covers the grid evenly with weights ``score^power * (1 + token maps since
    the token was a centre)``: importance counts once coverage is kept, and
    the centres rotate over depth, so that no token is merged everywhere.

    Args:
        scores (Tensor): Normalised scores, (maps, N).
        counts (Sequence[int]): Centres of each map.
        live (Tensor): Tokens that are not pruned, bool, (maps, N).
        grid (tuple[int, int]): Height and width, N = h * w.
        kind (str): 'score' or 'spread'.
        power (float): Exponent of the scores in 'spread'; 0 ignores them.
        seed (int): Seed of the jitter in 'spread'.
        rotate (bool): Whether the time since a token was a centre counts.

    Returns:
        Tensor: bool, (maps, N).
    """
    if kind == 'score':
        masks = [top_mask(row, n) for row, n in zip(scores, counts)]
        return torch.stack(masks)
    if kind != 'spread':
        raise ValueError(
            f'centres={kind!r} is unknown; choose one of {CENTRES}'
        )
    rng = np.random.default_rng(seed)
    age = torch.zeros(scores.shape[1], dtype=torch.float64)
    masks = []
    for row, count, alive in zip(scores, counts, live):
        floor = 1e-6 * row.max().double()
        weight = row.double().clamp_min(floor).pow(power) * (1 + age) * alive
        mask = spread_mask(weight, count, grid, rng)
        if rotate:
            age = torch.where(mask, 0.0, age + 1)
        masks.append(mask)
    return torch.stack(masks)
