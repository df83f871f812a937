"""Score thresholds, builders and initial weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_seg.core import (
    build_groups,
    count_tokens,
    group_weights,
    nearest_centre_groups,
    normalise_scores,
    row_window_groups,
)
from pm_seg.core.structure import check_scores

grids = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(grids, st.integers(0, 10**6), st.floats(0.05, 1))
@settings(max_examples=80, deadline=None)
def test_nearest_centre_is_nearest(grid, seed: int, share: float) -> None:
    """The distance transform agrees with comparing all distances."""
    torch.manual_seed(seed)
    count = grid[0] * grid[1]
    centres = torch.rand(count) < share
    centres[torch.randint(count, (1,))] = True
    group = nearest_centre_groups(centres, grid)
    yx = torch.stack(
        [torch.arange(count) // grid[1], torch.arange(count) % grid[1]], 1
    ).double()
    distance = torch.cdist(yx, yx[centres])
    chosen = distance.gather(1, group[:, None])[:, 0]
    torch.testing.assert_close(chosen, distance.min(1).values)
    assert torch.equal(group[centres], torch.arange(int(centres.sum()))), (
        'centres are numbered in raster order and own themselves'
    )
    index = torch.arange(count)
    row, column = index // grid[1], index % grid[1]
    squared = (row[:, None] - row[centres]) ** 2
    squared += (column[:, None] - column[centres]) ** 2
    # ties go to the column on the left, in a column to the centre above
    ranked = (squared * grid[1] + column[centres]) * grid[0] + row[centres]
    assert torch.equal(group, ranked.argmin(1))


def release_windows(centres: list[int], count: int, width: int) -> list[int]:
    """The rule of the release, written as a loop."""
    group, left = [0] * count, 0
    for number, centre in enumerate(centres):
        if number == len(centres) - 1:
            right = count
        else:
            following = centres[number + 1]
            right = -(-(centre + following) // 2)
            if (centre + 1) // width < right // width:
                right = ((centre + 1) // width + 1) * width
        for token in range(left, right):
            group[token] = number
        left = right
    return group


@given(grids, st.integers(0, 10**6), st.floats(0.05, 1))
@settings(max_examples=80, deadline=None)
def test_row_windows(grid, seed: int, share: float) -> None:
    torch.manual_seed(seed)
    count = grid[0] * grid[1]
    centres = torch.rand(count) < share
    centres[torch.randint(count, (1,))] = True
    expected = release_windows(
        centres.nonzero().flatten().tolist(), count, grid[1]
    )
    assert row_window_groups(centres, grid).tolist() == expected


def test_normalise_scores() -> None:
    scores = torch.rand(3, 10) + 0.1
    out = normalise_scores(scores, decay=0.025, layer_indices=(1, 4, 7))
    torch.testing.assert_close(
        out.norm(dim=1), torch.tensor([0.975, 0.9, 0.825])
    )


@pytest.mark.parametrize('keep', [0.3, 0.7, 1.0])
def test_global_thresholds_keep_the_share_overall(keep: float) -> None:
    scores = torch.rand(4, 100) * torch.tensor([[1.0], [1.2], [1.4], [1.6]])
    centres, live = count_tokens(scores, keep, 0.0)
    assert sum(centres) == int(100 * keep) * 4
    assert live == [100] * 4
    if keep < 1:
        assert centres == sorted(centres) and centres[0] < centres[-1]


def test_layer_thresholds_keep_the_same_share() -> None:
    scores = torch.rand(4, 100) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    centres, live = count_tokens(scores, 0.6, 0.1, 'layer')
    assert centres == [60] * 4
    assert live == [90] * 4


@pytest.mark.parametrize(
    ('keep', 'prune', 'message'),
    [
        (0.0, 0.0, 'keep=0.0 is not in'),
        (-1, 0.0, 'keep=-1 is not in'),
        (1.5, 0.0, 'keep=1.5 is not in'),
        (0.5, 1.0, 'prune=1.0 is not in'),
        (0.5, -0.1, 'prune=-0.1 is not in'),
        (0.8, 0.3, 'is above 1'),
    ],
)
def test_bad_rates(keep: float, prune: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_tokens(torch.rand(2, 10), keep, prune)


def test_a_layer_below_the_global_threshold() -> None:
    scores = torch.stack([torch.rand(10), torch.rand(10) + 10])
    assert count_tokens(scores, 0.5, 0.0)[0] == [0, 10]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s[1].fill_(0), 'layer 1 are all zero'),
        (lambda s: s[0, 3].fill_(float('nan')), 'layer 0 contain NaN'),
        (lambda s: s[1, 0].fill_(float('inf')), 'layer 1 contain NaN'),
        (lambda s: s[1, 2].fill_(-1.0), 'must be >= 0'),
    ],
)
def test_bad_scores(change, message: str) -> None:
    scores = torch.rand(2, 6) + 0.1
    change(scores)
    with pytest.raises(ValueError, match=message):
        check_scores(scores)


def test_build_groups() -> None:
    centres = torch.zeros(12, dtype=torch.bool)
    live = torch.ones(12, dtype=torch.bool)
    with pytest.raises(ValueError, match='got 0 centres'):
        build_groups(centres, live, (3, 4), 'row_window')
    centres[5] = True
    with pytest.raises(ValueError, match="builder='x' is unknown"):
        build_groups(centres, live, (3, 4), 'x')
    live[7] = False
    group = build_groups(centres, live, (3, 4), 'nearest_centre')
    assert group.tolist() == [0] * 7 + [-1] + [0] * 4
    live[5] = False
    with pytest.raises(ValueError, match='1 of them pruned'):
        build_groups(centres, live, (3, 4), 'nearest_centre')


def test_mean_weights() -> None:
    group = torch.tensor([0, 0, 0, 1, -1])
    merge, restore = group_weights(torch.rand(5), group, 'mean')
    third = 1 / 3
    torch.testing.assert_close(
        merge, torch.tensor([third, third, third, 1.0, 0.0])
    )
    torch.testing.assert_close(restore, torch.tensor([1.0, 1, 1, 1, 0]))


def test_score_weights() -> None:
    group = torch.tensor([0, 0, 1, -1])
    scores = torch.tensor([1.0, 4.0, 2.0, 0.5])
    merge, restore = group_weights(scores, group, 'score')
    torch.testing.assert_close(merge, torch.tensor([0.25, 1.0, 1.0, 0.0]))
    power = 0.25**2 + 1
    torch.testing.assert_close(
        restore, torch.tensor([0.25 / power, 1 / power, 1.0, 0.0])
    )
    with pytest.raises(ValueError, match="weights='max' is unknown"):
        group_weights(scores, group, 'max')
