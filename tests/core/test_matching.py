"""Similarity of tokens: sketches and moves to the nearest group.

The matchings are tested in test_merging.py, with what uses them.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from pm_seg.core.matching import (
    SKETCH,
    assign,
    neighbours,
    sketch,
    sketch_dims,
)

EVERY = torch.arange(10).expand(80, -1)


@pytest.mark.parametrize(
    ('dims', 'expected'),
    [
        (4, 4),
        (64, 64),
        (100, 100),
        (192, 64),
        (384, 64),
        (1024, 64),
        (260, 65),
    ],
)
def test_sketches_have_about_64_channels(dims: int, expected: int) -> None:
    assert sketch_dims(dims) == expected
    signs = torch.ones(dims)
    assert sketch(torch.rand(2, 3, dims), signs).shape == (2, 3, expected)


def test_sketches_keep_scalar_products() -> None:
    torch.manual_seed(0)
    # Channels that fold onto each other alike: a plain sum would add them up.
    x = torch.randn(1, 200, 768) + torch.randn(64).repeat(12)
    signs = torch.randint(2, (768,)) * 2.0 - 1
    small = sketch(x.bfloat16(), signs)
    assert small.dtype == torch.float32
    cosine = [F.normalize(t[0], dim=-1) for t in (x, small)]
    error = cosine[0] @ cosine[0].T - cosine[1] @ cosine[1].T
    assert error.abs().mean() < 1.2 / SKETCH**0.5


def test_tokens_move_to_the_most_similar_group() -> None:
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(6, 16), dim=-1)
    kind = torch.randint(6, (3, 50))
    metric = directions[kind] + 0.05 * torch.randn(3, 50, 16)
    metric = metric * torch.rand(3, 50, 1).add(0.1)  # only angles count
    seeds = 7 * directions.expand(3, -1, -1)
    every = torch.arange(6).expand(50, -1)
    assert torch.equal(assign(metric, seeds, every, 1), kind)
    two = torch.tensor([2, 5]).expand(50, -1)
    moved = assign(metric, seeds, two, 1)
    assert set(moved.unique().tolist()) == {2, 5}
    assert torch.equal(moved[kind == 2], kind[kind == 2])


def test_all_ways_of_comparing_agree(monkeypatch) -> None:
    """Gathers, one by one on large inputs, and a product with all groups."""
    module = importlib.import_module('pm_seg.core.matching')
    torch.manual_seed(0)
    metric, seeds = torch.randn(2, 80, 16), torch.randn(2, 12, 16)
    candidates = torch.randint(12, (80, 9))
    expected = assign(metric, seeds, candidates, 2)
    with monkeypatch.context() as patch:
        patch.setattr(module, '_LARGE', 0)
        assert torch.equal(assign(metric, seeds, candidates, 2), expected)
    monkeypatch.setattr(module, '_compare_all', lambda metric: True)
    assert torch.equal(assign(metric, seeds, candidates, 2), expected)


def test_rounds_tighten_the_groups() -> None:
    torch.manual_seed(0)
    metric = F.normalize(torch.randn(2, 80, 8), dim=-1)
    seeds = metric[:, :10]

    def fit(rounds: int) -> float:
        group = assign(metric, seeds, EVERY, rounds)
        sums = torch.zeros(2, 10, 8)
        sums.scatter_add_(1, group.unsqueeze(-1).expand_as(metric), metric)
        return sums.norm(dim=-1).sum().item()  # summed cosine to the mean

    fits = [fit(rounds) for rounds in (1, 2, 4, 8)]
    assert fits == sorted(fits) and fits[-1] > 1.02 * fits[0]


def test_neighbours_are_the_groups_around() -> None:
    slot = (
        torch.arange(36).view(6, 6) // 2 % 3
        + torch.arange(6)[:, None] // 2 * 3
    )
    slot = slot.flatten()  # 2x2 squares in a 3x3 layout
    near = neighbours(slot, 9, (6, 6)).view(6, 6, 9)
    assert sorted(near[2, 2].tolist()) == list(range(9))
    assert near[0, 0].tolist() == [0, 0, 1, 0, 0, 1, 3, 3, 4]
    assert torch.equal(near[..., 4].flatten(), slot)
