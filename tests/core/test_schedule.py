"""How many tokens a budget leaves, for any transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toy import make, shape_of

from pm_seg.core import ProgressiveCompressor, make_compressor
from pm_seg.core.schedule import (
    FLOOR,
    SCHEDULES,
    merging_layers,
    power_shares,
    solve,
)
from pm_seg.utils import count_macs

keeps = st.floats(0.2, 1)
depths = st.sampled_from([4, 6, 12, 24])
grids = st.tuples(st.integers(8, 40), st.integers(8, 40))


def build(grid, depth: int = 12, dims: int = 192, **options):
    shape = shape_of(depth, grid, 1, dims, dims // 64)
    return make_compressor(options, shape)


@given(keeps, depths, grids, st.sampled_from([192, 384]), st.floats(0.3, 2))
@settings(max_examples=60)
def test_a_budget_is_kept_and_used(keep, depth, grid, dims, power) -> None:
    try:
        module = build(grid, depth, dims, keep=keep, power=power)
    except ValueError as error:
        assert 'out of reach' in str(error)
        floor = 1 / depth + FLOOR  # the first layer is dense
        assert keep < floor + 0.12
        return
    assert module.share <= keep
    # What the step from one count of tokens to the next costs.
    step = 10 / (grid[0] * grid[1])
    assert module.share > keep - 0.01 - step


@given(keeps, depths, grids, st.sampled_from(['tome', 'algm']))
@settings(max_examples=30)
def test_peers_keep_a_budget_too(keep, depth, grid, kind) -> None:
    try:
        module = build(grid, depth, type=kind, keep=keep)
    except ValueError as error:
        assert 'out of reach' in str(error)
        assert keep < 0.55
        return
    assert module.share <= keep
    assert module.share > keep - 0.1


@given(
    st.sampled_from(['pm', 'tome', 'algm']),
    st.floats(0.6, 1),
    depths,
    grids,
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(max_examples=60)
def test_tokens_only_get_fewer_on_any_grid(kind, keep, depth, native, grid):
    module = build(native, depth, type=kind, keep=keep)
    counts = module.tokens(grid)
    whole = grid[0] * grid[1]
    assert len(counts) == depth
    assert all(a >= b for a, b in zip([whole, *counts], [*counts, 1]))
    if kind == 'pm':
        assert counts[0] == whole
        for count in counts:
            assert count == whole or count <= 64 or count % 8 == 0
            assert count >= min(max(0.9 * FLOOR * whole - 4, 1), whole)
    share = [count / whole for count in counts]
    if kind == 'pm' and whole > 500 and native[0] * native[1] > 500:
        # A grid's own tokens, in the proportions of the native one.
        for a, b in zip(share, module.loads()):
            assert abs(a - b.kept / (native[0] * native[1])) < 0.02


@pytest.mark.parametrize(
    'options',
    [
        dict(keep=0.5),
        dict(keep=0.4, first=0),
        dict(keep=0.6, compare='keys', power=1.5),
        dict(keep=0.6, compare='tokens', restore='replace'),
        dict(keep=0.3, power=0.3),
        dict(keep=1.0),
        dict(type='tome', keep=0.6),
        dict(type='algm', keep=0.6),
    ],
)
@torch.no_grad()
def test_what_is_said_is_what_runs(options: dict) -> None:
    """The budget's count against a counter of all operations that run."""
    shape = shape_of(8, (10, 14), 2, 96, 3)
    layers, compressor = make(options, shape)
    x = torch.randn(1, 142, 96)
    counted = count_macs(lambda: compressor.run(layers, x, shape.grid))
    said = compressor.share * shape.dense_macs
    assert said == pytest.approx(counted, rel=0.01)
    with compressor.disabled():
        dense = count_macs(lambda: compressor.run(layers, x, shape.grid))
    assert dense == shape.dense_macs


@torch.no_grad()
def test_merging_and_restoring_are_in_the_budget() -> None:
    """Exactly, but for the sizes, which have one channel."""
    shape = shape_of(8, (10, 14), 2, 48, 3)
    options = dict(keep=0.6, compare='tokens')
    layers, compressor = make(options, shape)
    x = torch.randn(1, 142, 48)
    counted = count_macs(lambda: compressor.run(layers, x, shape.grid))
    said = compressor.share * shape.dense_macs
    own = sum(shape.cost(2 + load.kept) for load in compressor.loads())
    assert said - own == pytest.approx(counted - own, rel=0.02)


def test_the_power_says_where_tokens_go() -> None:
    early, late = (power_shares(0.5, 6, p, 1) for p in (0.5, 2.0))
    assert early[0] == late[0] == 1 and early[-1] == late[-1] == 0.5
    assert all(a < b for a, b in zip(early[1:-1], late[1:-1]))
    assert power_shares(5.0, 3, 1.0, 0) == [FLOOR] * 3
    assert power_shares(0.4, 4, 1.0, 2) == pytest.approx([1, 1, 0.8, 0.6])
    for shares in SCHEDULES.values():
        assert shares(0.0, 4, 1.0, 1) == [1.0] * 4


@given(st.lists(st.floats(0.01, 1), min_size=1), st.floats(0, 0.99))
def test_small_merges_wait(falls: list[float], step: float) -> None:
    shares = [min(falls[: layer + 1]) for layer in range(len(falls))]
    layers = merging_layers(shares, step)
    assert bool(layers) == (shares[-1] < 1)
    left = 1.0
    for layer, share in enumerate(shares):
        enough = share < left and left - share >= step * left
        if len(layers) > 1:
            assert (layer in layers) == enough
        left = share if layer in layers else left
    if step == 0:
        fewer = zip([1.0, *shares], shares)
        assert layers == [i for i, (a, b) in enumerate(fewer) if b < a]


@pytest.mark.parametrize('keep', [0.5, 0.7, 0.9, 0.99])
def test_fewer_merges_cost_the_same(keep: float) -> None:
    each, some = (build((32, 32), keep=keep, step=s) for s in (0.0, 0.125))
    merges = []
    for module in (each, some):
        assert keep - 0.01 < module.share <= keep
        left = [1024, *module.tokens((32, 32))]
        merges.append([1 - b / a for a, b in zip(left, left[1:]) if b < a])
    assert len(merges[0]) == 11 or keep == 0.99
    assert 0 < len(merges[1]) < 7
    if keep < 0.9:  # counts are rounded, and the budget is met anew
        assert min(merges[1]) > 0.11


def test_a_budget_that_needs_every_merge_gets_them() -> None:
    """Waiting for half of the tokens would leave too many layers dense."""
    module = build((32, 32), keep=0.5, power=1.0, step=0.5)
    assert 0.49 < module.share <= 0.5
    counts = module.tokens((32, 32))
    assert len(set(counts)) == len(counts)
    with pytest.raises(ValueError, match=r'step=1 must be a number in'):
        build((16, 16), step=1)


def test_what_merged_stays_merged() -> None:
    schedule = build((4, 6), 4).schedule
    assert schedule.tokens([1.0, 0.5, 0.75, 0.25], (4, 6)) == [24, 12, 12, 6]


def test_no_layer_merges_more_than_half_between_its_halves() -> None:
    """As a single matching allows; ahead of a layer there may be several."""
    tome = SCHEDULES['constant'](1024.0, 4, 1.0, 0)
    assert tome == pytest.approx([0.5, 0.25, 0.125, FLOOR])
    for kind in ('tome', 'algm'):
        module = build((7, 9), 6, type=kind, keep=0.75)
        for share in (0.01, 0.3):
            shares = [share] * 6
            counts = module.schedule.tokens(shares, (7, 9))
            first = 63 - 3 * 12 if kind == 'algm' else 1
            assert counts[0] >= first
            assert all(b >= a // 2 for a, b in zip(counts, counts[1:]))


def test_another_power_costs_the_same() -> None:
    module = build((16, 16), keep=0.5)
    before = module.tokens((16, 16))
    module.set_keep(0.5, power=1.5)
    after = module.tokens((16, 16))
    assert before != after and before[4] < after[4]
    assert module.share == pytest.approx(0.5, abs=0.02)
    module.set_keep(0.4)
    assert module.schedule.power == 1.5, 'the power stays'


@given(st.floats(0.1, 2), st.floats(0, 3))
def test_bisection_ends_below_the_budget(budget, start) -> None:
    def cost(shares: list[float]) -> float:
        return sum(shares)

    def shares(strength: float) -> list[float]:
        return [1 / (1 + strength), start / (1 + strength) ** 2]

    assume(cost(shares(1024.0)) <= budget)
    found = cost(solve(shares, cost, budget))
    assert found <= budget
    assert found == pytest.approx(min(budget, 1 + start), rel=1e-3)


@pytest.mark.parametrize('keep', [0, -0.1, 1.01, float('nan'), '0.5', None])
def test_a_share_is_a_number_up_to_one(keep) -> None:
    with pytest.raises(ValueError, match=r'is not in \(0, 1\].*keep=0.5'):
        ProgressiveCompressor(shape_of(), keep=keep)


def test_what_is_out_of_reach_says_how_far_it_goes() -> None:
    with pytest.raises(ValueError) as error:
        build((14, 14), 4, keep=0.2)
    text = str(error.value)
    assert 'keep=0.2 is out of reach' in text and 'a lower first' in text
    least = float(text.split(': ')[1].split(' ')[0])
    assert build((14, 14), 4, keep=least + 0.01).share <= least + 0.01
    with pytest.raises(ValueError, match='out of reach'):
        build((14, 14), 4, keep=least - 0.01)
    lower = replace(build((14, 14), 4).schedule, first=0)
    assert lower.solve(0.2)[0] < 1
