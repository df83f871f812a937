"""Which tokens merge, against searches that try all pairs."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pm_seg.core import match, match_windows
from pm_seg.core.similarity import SKETCH, sketch, sketch_dims

seeds = st.integers(0, 10**6)


def places(goals: list[int]) -> list[int]:
    """Place of each token that goes to another, or to itself."""
    stay = [token for token, goal in enumerate(goals) if token == goal]
    return [stay.index(goal) for goal in goals]


def by_trying_all(
    metric: Tensor, count: int, weight: Tensor | None = None
) -> list[int]:
    """Bipartite matching of one image, (T, D), in plain Python."""
    unit = F.normalize(metric.double(), dim=-1)
    tokens = len(metric)
    weight = torch.ones(tokens) if weight is None else weight
    nearest = []
    for even in range(0, tokens, 2):
        nearest.append(
            min(
                (
                    float((1 - unit[even] @ unit[odd]) * weight[even])
                    * float(weight[odd]),
                    even,
                    odd,
                )
                for odd in range(1, tokens, 2)
            )
        )
    goals = list(range(tokens))
    for _, even, odd in sorted(nearest)[:count]:
        goals[even] = odd
    return places(goals)


@given(
    st.integers(1, 3),
    st.integers(2, 24),
    st.floats(0, 1),
    st.integers(0, 2),
    st.booleans(),
    seeds,
)
def test_the_most_similar_pairs_merge(
    batch, tokens, share, prefix, weighted, seed
) -> None:
    """With and without weights; each image on its own."""
    torch.manual_seed(seed)
    metric, count = torch.randn(batch, tokens, 6), int(share * (tokens // 2))
    weight = torch.rand(batch, tokens) + 0.5 if weighted else None
    place = match(metric, count, prefix, weight).place
    assert place[:, :prefix].eq(torch.arange(prefix)).all()
    for image in range(batch):
        expected = by_trying_all(
            metric[image], count, weight[image] if weighted else None
        )
        assert (place[image, prefix:] - prefix).tolist() == expected


def test_heavy_tokens_stay_alone() -> None:
    """Equal ones too: what differs by nothing is as near at any weight."""
    torch.manual_seed(0)
    metric = torch.randn(1, 40, 8)
    weight = torch.ones(1, 40)
    heavy = [0, 1, 7, 30, 31]
    weight[:, heavy] = 100.0
    place = match(metric, 15, weight=weight).place[0]
    sizes = place.bincount()
    assert len(sizes) == 25
    assert (sizes[place[heavy]] == 1).all()
    assert not (sizes[match(metric, 15).place[0][heavy]] == 1).all()


@given(st.integers(2, 30), st.floats(0, 1), st.booleans(), st.booleans())
def test_ties_leave_the_counts_alone(tokens, share, zero, weighted) -> None:
    """Identical tokens, or none at all to compare, merge as many."""
    metric = torch.full((2, tokens, 4), 0.0 if zero else 0.3)
    count = int(share * (tokens // 2))
    weight = torch.full((2, tokens), 1.7) if weighted else None
    merge = match(metric, count, 1, weight)
    assert len(merge.kept) == 2 * (1 + tokens - count)
    assert len(merge.moved) == 2 * count
    assert torch.equal(merge.place[0], merge.place[1])
    used = merge.place[0].unique()
    assert torch.equal(used, torch.arange(1 + tokens - count))


def windows_by_trying_all(
    metric: Tensor, count: int, grid: tuple[int, int]
) -> list[int]:
    unit = F.normalize(metric.double(), dim=-1)
    found = []
    for top in range(0, grid[0] - 1, 2):
        for left in range(0, grid[1] - 1, 2):
            first = top * grid[1] + left
            tokens = [first, first + 1, first + grid[1], first + grid[1] + 1]
            cosines = [
                float(unit[a] @ unit[b]) for a, b in combinations(tokens, 2)
            ]
            found.append((-sum(cosines), tokens))
    goals = list(range(len(metric)))
    for _, tokens in sorted(found)[:count]:
        for token in tokens:
            goals[token] = tokens[0]
    return places(goals)


@given(
    st.integers(1, 3),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.floats(0, 1),
    st.integers(0, 2),
    seeds,
)
def test_the_most_uniform_windows_merge(batch, grid, share, prefix, seed):
    """An odd last row or column is in none."""
    torch.manual_seed(seed)
    metric = torch.randn(batch, grid[0] * grid[1], 5)
    count = int(share * (grid[0] // 2) * (grid[1] // 2))
    merge = match_windows(metric, count, grid, prefix)
    assert len(merge.moved) == 3 * count * batch
    for image in range(batch):
        expected = windows_by_trying_all(metric[image], count, grid)
        found = merge.place[image, prefix:] - prefix
        assert found.tolist() == expected


@pytest.mark.parametrize(
    ('dims', 'expected'),
    [(4, 4), (64, 64), (100, 100), (384, 64), (1024, 64), (260, 65)],
)  # fmt: skip
def test_sketches_have_about_64_channels(dims: int, expected: int) -> None:
    assert sketch_dims(dims) == expected
    signs = torch.randint(2, (dims,)) * 2.0 - 1
    x = torch.randn(2, 3, dims)
    fold = torch.eye(expected).repeat(dims // expected, 1) * signs[:, None]
    torch.testing.assert_close(
        sketch(x, signs), x @ fold, rtol=1e-4, atol=1e-4
    )


def test_sketches_keep_scalar_products() -> None:
    # Channels that fold onto each other alike: a plain sum would add them up.
    x = torch.randn(1, 200, 768) + torch.randn(64).repeat(12)
    signs = torch.randint(2, (768,)) * 2.0 - 1
    small = sketch(x.bfloat16(), signs)
    assert small.dtype == torch.float32
    cosine = [F.normalize(t[0], dim=-1) for t in (x, small)]
    error = cosine[0] @ cosine[0].T - cosine[1] @ cosine[1].T
    assert error.abs().mean() < 1.2 / SKETCH**0.5
