"""Score thresholds, row windows and initial weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_seg.core import (
    count_tokens,
    group_weights,
    normalise_scores,
    row_window_groups,
)
from pm_seg.core.structure import check_rates, check_scores, make_groups

grids = st.tuples(st.integers(1, 12), st.integers(1, 12))


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
    out = normalise_scores(scores, decay=0.025, layers=(1, 4, 7))
    torch.testing.assert_close(
        out.norm(dim=1), torch.tensor([0.975, 0.9, 0.825])
    )


@pytest.mark.parametrize('scale', [1e-30, 1e-8, 1.0, 1e30])
def test_normalised_scores_do_not_depend_on_their_scale(scale: float) -> None:
    """In float32, whose squares of such scores are 0 or inf."""
    scores = torch.rand(2, 50) + 0.01
    torch.testing.assert_close(
        normalise_scores(scores * scale), normalise_scores(scores)
    )


def test_normalised_scores_are_the_plain_quotient_bit_for_bit() -> None:
    scores = torch.rand(5, 100) * 1e-8
    expected = scores / scores.norm(dim=1, keepdim=True)
    assert torch.equal(normalise_scores(scores), expected)


@pytest.mark.parametrize('keep_rate', [0.3, 0.7, 1.0])
def test_global_thresholds_keep_the_share_overall(keep_rate: float) -> None:
    scores = torch.rand(4, 100) * torch.tensor([[1.0], [1.2], [1.4], [1.6]])
    centres, live = count_tokens(scores, keep_rate, 0.0, 'global')
    assert sum(centres) == int(100 * keep_rate) * 4
    assert live == [100] * 4
    if keep_rate < 1:
        assert centres == sorted(centres) and centres[0] < centres[-1]


def test_global_thresholds_prune_the_share_overall() -> None:
    scores = torch.rand(4, 100) * torch.tensor([[1.0], [1.2], [1.4], [1.6]])
    _, live = count_tokens(scores, 0.5, 0.2, 'global')
    assert sum(live) == 320 and live[0] < live[-1]


def test_layer_thresholds_keep_the_same_share() -> None:
    scores = torch.rand(4, 100) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    centres, live = count_tokens(scores, 0.6, 0.1)
    assert centres == [60] * 4
    assert live == [90] * 4


def test_a_layer_below_the_global_threshold_keeps_nothing() -> None:
    scores = torch.stack([torch.rand(10), torch.rand(10) + 10])
    assert count_tokens(scores, 0.5, 0.0, 'global')[0] == [0, 10]


@pytest.mark.parametrize(
    ('keep_rate', 'prune_rate', 'message'),
    [
        (0.0, 0.0, 'keep_rate=0.0 is not in'),
        (-1, 0.0, 'keep_rate=-1 is not in'),
        (1.5, 0.0, 'keep_rate=1.5 is not in'),
        (0.5, 1.0, 'prune_rate=1.0 is not in'),
        (0.5, -0.1, 'prune_rate=-0.1 is not in'),
        (0.8, 0.3, 'is above 1'),
        ('0.8', 0.0, "keep_rate='0.8' is not in"),
        (0.5, None, 'prune_rate=None is not in'),
    ],
)
def test_bad_rates(keep_rate, prune_rate, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_rates(keep_rate, prune_rate)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s[1].fill_(0), 'layer 7 are all zero'),
        (lambda s: s[0, 3].fill_(float('nan')), 'layer 4 contain NaN'),
        (lambda s: s[1, 0].fill_(float('inf')), 'layer 7 contain NaN'),
        (lambda s: s[1, 2].fill_(-1.0), 'must be >= 0'),
    ],
)
def test_bad_scores(change, message: str) -> None:
    scores = torch.rand(2, 6) + 0.1
    change(scores)
    with pytest.raises(ValueError, match=message):
        check_scores(scores, (4, 7))


@given(grids, st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_groups_have_the_numbers_asked_for(grid, seed, keep, live) -> None:
    """Also where scores are equal; the highest are centres, none pruned."""
    torch.manual_seed(seed)
    tokens = grid[0] * grid[1]
    scores = torch.randint(5, (2, tokens)).float()
    centres = max(round(keep * tokens), 1)
    alive = max(round(live * tokens), centres)
    group = make_groups(scores, [centres, 1], [alive, tokens], grid)
    assert group[0].max() == centres - 1
    assert int((group[0] >= 0).sum()) == alive
    assert (group[1] == 0).all()
    if alive < tokens:
        pruned = group[0] < 0
        assert scores[0][pruned].max() <= scores[0][~pruned].min()


def test_score_weights() -> None:
    group = torch.tensor([0, 0, 1, -1])
    scores = torch.tensor([1.0, 4.0, 2.0, 0.5])
    merge, restore = group_weights(scores, group)
    torch.testing.assert_close(merge, torch.tensor([0.25, 1.0, 1.0, 0.0]))
    power = 0.25**2 + 1
    torch.testing.assert_close(
        restore, torch.tensor([0.25 / power, 1 / power, 1.0, 0.0])
    )


def test_tokens_of_a_group_without_scores_count_alike() -> None:
    group = torch.tensor([0, 1, 1, 1, -1])
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    merge, restore = group_weights(scores, group)
    torch.testing.assert_close(merge, torch.tensor([1.0, 1, 1, 1, 0]))
    third = 1 / 3
    torch.testing.assert_close(
        restore, torch.tensor([1.0, third, third, third, 0.0])
    )
