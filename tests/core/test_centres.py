"""Choice of centres."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_seg.core.centres import select_centres, spread_mask, top_mask

GRID = (12, 16)


def covering_radius(mask: torch.Tensor, grid=GRID) -> float:
    """Distance of the worst covered token to its centre."""
    index = torch.arange(mask.numel())
    yx = torch.stack([index // grid[1], index % grid[1]], 1).double()
    return torch.cdist(yx, yx[mask]).min(1).values.max().item()


def select(scores: torch.Tensor, count: int, **options) -> torch.Tensor:
    live = torch.ones_like(scores, dtype=torch.bool)
    options = {'kind': 'spread', **options}
    return select_centres(scores, [count] * len(scores), live, GRID, **options)


def test_score_takes_the_highest() -> None:
    scores = torch.rand(3, 192)
    masks = select(scores, 20, kind='score')
    for row, mask in zip(scores, masks):
        assert mask.sum() == 20
        assert row[mask].min() > row[~mask].max()


@given(st.integers(0, 1000), st.integers(1, 192))
@settings(max_examples=30, deadline=None)
def test_spread_counts_and_covers(seed: int, count: int) -> None:
    """As many as asked for; even weights cover like a regular grid."""
    rng = np.random.default_rng(seed)
    mask = spread_mask(torch.ones(192), count, GRID, rng)
    assert mask.sum() == count
    spacing = (192 / count) ** 0.5
    assert covering_radius(mask) <= 1.6 * spacing + 1


def plain_spread(weight, count: int, grid, rng) -> torch.Tensor:
    """Farthest-point sampling with every distance updated by every centre."""
    gain = (weight.numpy() * rng.uniform(0.95, 1.05, len(weight))) ** 2
    index = np.arange(len(weight))
    rows, columns = index // grid[1], index % grid[1]
    nearest = np.full(len(weight), float(sum(grid) ** 2))
    mask = torch.zeros(len(weight), dtype=torch.bool)
    for _ in range(count):
        place = int((gain * nearest).argmax())
        mask[place] = True
        gain[place] = -1
        distance = (rows - rows[place]) ** 2 + (columns - columns[place]) ** 2
        nearest = np.minimum(nearest, np.maximum(distance, 1))
    return mask


@given(
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.floats(0, 1),
    st.sampled_from([0, 1, 6]),
    st.sampled_from([0.0, 0.4]),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_spread_takes_the_shortcuts_that_change_nothing(
    grid, share: float, power: int, zeros: float, seed: int
) -> None:
    """Windows and row maxima give what updating everything gives."""
    torch.manual_seed(seed)
    total = grid[0] * grid[1]
    weight = torch.rand(total).double() ** power
    weight *= torch.rand(total) >= zeros
    count = max(round(share * total), 1)
    fast, plain = (
        spread(weight, count, grid, np.random.default_rng(seed))
        for spread in (spread_mask, plain_spread)
    )
    assert torch.equal(fast, plain)


def test_spread_covers_where_scores_alone_do_not() -> None:
    scores = torch.full((1, 12, 16), 0.1)
    scores[0, :4, :4] = 1.0
    scores += 0.01 * torch.rand_like(scores)
    flat = scores.reshape(1, -1)
    alone, spread = select(flat, 16, kind='score'), select(flat, 16)
    assert covering_radius(alone[0]) > 12
    assert covering_radius(spread[0]) < 9
    even = select(flat, 16, power=0.0)
    corner = torch.zeros(12, 16, dtype=torch.bool)
    corner[:4, :4] = True
    inside = [int((m[0] & corner.flatten()).sum()) for m in (spread, even)]
    assert inside[0] > inside[1], 'denser where scores are high'


def test_centres_rotate_over_depth() -> None:
    """Two maps at half of the tokens: nearly every token is a centre once."""
    scores = torch.ones(2, 192)
    masks = select(scores, 96)
    assert (masks[0] | masks[1]).float().mean() > 0.9
    still = select(scores[:1].expand(2, -1), 96, kind='score')
    assert torch.equal(still[0], still[1])


def test_deterministic_by_seed() -> None:
    scores = torch.rand(3, 192)
    assert torch.equal(select(scores, 40), select(scores, 40))
    assert not torch.equal(select(scores, 40), select(scores, 40, seed=1))


def test_pruned_tokens_are_no_centres() -> None:
    scores = torch.rand(2, 192)
    live = torch.stack([top_mask(row, 100) for row in scores])
    masks = select_centres(scores, [60, 60], live, GRID, kind='spread')
    assert not (masks & ~live).any()


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="centres='x' is unknown"):
        select(torch.rand(1, 192), 4, kind='x')
