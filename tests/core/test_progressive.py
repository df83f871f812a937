"""Tokens that merge over depth, beside what all kinds of compression do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import KINDS, make, shape_of

from pm_seg.core import (
    GroupRecorder,
    ProgressiveCompressor,
    match,
    run_dense,
)
from pm_seg.core.similarity import COMPARES

GRID = (4, 6)


def full_gain(compressor: ProgressiveCompressor) -> None:
    with torch.no_grad():
        compressor.gain.fill_(1.0)


def recorded(compressor, layers, x: Tensor, grid=GRID) -> list[Tensor]:
    with GroupRecorder(compressor) as recorder, torch.no_grad():
        compressor.run(layers, x, grid)
    return recorder.groups


# ----------------------------------------------------------------- exactness


@pytest.mark.parametrize('kind', ['pm', 'tome'])
@torch.no_grad()
def test_the_last_mlp_works_on_what_is_read(kind: str) -> None:
    """On prefix tokens alone if no others are; peers are as published."""
    shape = shape_of(num_prefix=2)
    layers, compressor = make({**KINDS[kind], 'keep': 0.6}, shape)
    shares = compressor.shares.clone()
    compressor.leave_merged()
    kept = [load.kept for load in compressor.loads()]
    assert compressor.share <= 0.6 and compressor.keep == 0.6
    assert not compressor.gain.requires_grad
    x = torch.randn(2, 26, 24)
    seen = []
    layers[-1].mlp.register_forward_hook(
        lambda module, args, out: seen.append(out.shape[1] - 2)
    )
    found = compressor.run(layers, x, GRID, outputs=(1, 3))
    assert seen == kept[-1:]
    assert torch.equal(found.last, found.layers[3])
    if kind == 'tome':
        assert kept[-1] > 0 and torch.equal(compressor.shares, shares)
        return
    assert kept[-1] == 0 and kept[-2] > 0
    assert (compressor.shares >= shares).all(), 'others keep more for it'
    assert (compressor.shares > shares).any()
    # The same merges, with the whole of the last layer.
    _, other = make({**KINDS[kind], 'keep': 0.6}, shape)
    other._shares = compressor._shares
    expected = other.run(layers, x, GRID).last[:, :2]
    torch.testing.assert_close(found.last[:, :2], expected)
    with_all, compressor = make({**KINDS[kind], 'keep': 1.0}, shape)
    compressor.leave_merged()
    dense = run_dense(with_all, x).last
    assert torch.equal(compressor.run(with_all, x, GRID).last, dense)


def make_comparing(compare: str, shape, **options):
    """Layers and a compressor, calibrated for 'components'."""
    learned = compare == 'components'
    options['compare'] = 'sketch' if learned else compare
    layers, compressor = make(options, shape)
    if learned:
        compressor.learn(torch.zeros(4, 24), random_components())
    assert compressor.schedule.compare == compare
    return layers, compressor


def random_components() -> torch.Tensor:
    return torch.linalg.qr(torch.randn(4, 24, 24)).Q


@pytest.mark.parametrize('compare', COMPARES)
@pytest.mark.parametrize('restore', ['residual', 'replace'])
@pytest.mark.parametrize('between', [False, True])
@torch.no_grad()
def test_groups_of_identical_tokens_lose_nothing(
    compare: str, restore: str, between: bool
) -> None:
    """As attention counts a token as often as the patches it stands for."""
    options = dict(keep=0.75, first=0, restore=restore, between=between)
    shape = shape_of(num_prefix=2)
    layers, compressor = make_comparing(compare, shape, **options)
    full_gain(compressor)
    # Three kinds of tokens: the three most different always stay.
    kinds = torch.randn(2, 3, 24)
    x = torch.cat(
        [torch.randn(2, 2, 24), kinds[:, torch.randint(3, (24,))]], 1
    )
    out = compressor.run(layers, x, GRID, outputs=(1,))
    groups = recorded(compressor, layers, x)
    assert groups[-1].max() < 20
    expected = run_dense(layers, x, (1,))
    for a, b in (
        (out.last, expected.last),
        (out.layers[1], expected.layers[1]),
    ):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    unaware = dict(options, size_aware=False)
    other = make(unaware, shape_of(num_prefix=2))[1]
    full_gain(other)
    error = other.run(layers, x, GRID).last - expected.last
    assert error.abs().max() > 1e-3 * expected.last.abs().max()


@torch.no_grad()
def test_balanced_groups_grow_evenly() -> None:
    """As soon as sizes differ; the first merge is of single tokens."""
    x = torch.randn(4, 27, 24)
    x[:, 3:15] = x[:, 3:4] + 0.8 * x[:, 3:15]  # an even region
    largest = []
    for balance in (0.0, 0.5, 2.0):
        options = dict(keep=0.5, first=0, compare='tokens', balance=balance)
        layers, compressor = make(options, shape_of(num_prefix=3))
        groups = recorded(compressor, layers, x)
        sizes = [one.bincount().max() for one in groups[-1]]
        largest.append((torch.stack(sizes).float().mean(), groups[0]))
    assert largest[0][0] > largest[1][0] > largest[2][0]
    assert all(torch.equal(largest[0][1], first) for _, first in largest)


class Linear(nn.Module):
    """A layer without attention: what it adds is linear in a token."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight = nn.Linear(dims, dims, bias=False).double()

    def forward(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        return x + self.weight(x)


@given(
    st.floats(0.5, 1),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.integers(0, 2),
    st.integers(0, 10**6),
)
@settings(max_examples=30)
@torch.no_grad()
def test_means_of_groups_are_exact_where_layers_are_linear(
    keep, grid, prefix, seed
) -> None:
    """Whatever merges, and however often."""
    torch.manual_seed(seed)
    shape = shape_of(num_prefix=prefix, dims=8, heads=2)
    compressor = ProgressiveCompressor(shape, keep=keep)
    full_gain(compressor)
    layers = [Linear(8) for _ in range(4)]
    x = torch.randn(2, prefix + grid[0] * grid[1], 8).double()
    out = compressor.run(layers, x, grid)
    expected = run_dense(layers, x).last
    torch.testing.assert_close(out.last[:, :prefix], expected[:, :prefix])
    if out.groups is None:
        torch.testing.assert_close(out.last, expected)
        return
    means = [out.groups.mean(y[:, prefix:]) for y in (out.last, expected)]
    torch.testing.assert_close(*means)


@torch.no_grad()
def test_a_token_that_stays_alone_loses_nothing_of_what_it_gained() -> None:
    """The gain is for groups of several."""
    shape = shape_of()
    compressor = ProgressiveCompressor(shape, keep=0.8)
    compressor.gain.fill_(0.8)
    layers = [Linear(24) for _ in range(4)]
    x = torch.randn(2, 25, 24).double()
    out = compressor.run(layers, x, GRID)
    expected = run_dense(layers, x).last
    alone = out.groups.size.squeeze(2)[:, 1:] == 1
    alone = torch.stack([a[p] for a, p in zip(alone, out.groups.place)])
    assert 0 < alone.sum() < alone.numel()
    patches, wanted = out.last[:, 1:], expected[:, 1:]
    torch.testing.assert_close(patches[alone], wanted[alone])
    assert not torch.isclose(patches[~alone], wanted[~alone]).any(1).all()


# ---------------------------------------------------------------- what merges


@pytest.mark.parametrize('kind', ['pm', 'tome', 'algm'])
def test_groups_only_ever_join(kind: str) -> None:
    """Down to the tokens it says, in every image its own."""
    layers, compressor = make(KINDS[kind])
    groups = recorded(compressor, layers, torch.randn(2, 25, 24))
    for before, after in zip(groups, groups[1:]):
        for image in range(2):
            rows = [g[image % len(g)] for g in (before, after)]
            pairs = torch.stack(rows, 1).unique(dim=0)
            assert len(pairs) == len(rows[0].unique())
    assert not torch.equal(groups[-1][0], groups[-1][1])


@torch.no_grad()
def test_peers_compare_what_came_before_attention() -> None:
    """Keys are those that attention used, as in ToMe."""
    layers, compressor = make(KINDS['tome'])
    x = torch.randn(1, 25, 24)
    found = recorded(compressor, layers, x)[0]
    count = 24 - compressor.tokens(GRID)[0]
    expected = match(layers[0].mean_keys(x[:, 1:]), count).place
    assert torch.equal(found, expected)
    attended = layers[0].mean_keys(layers[0].attend(x)[:, 1:])
    assert not torch.equal(match(attended, count).place, expected)


def test_a_layer_may_merge_more_than_half() -> None:
    """In several matchings."""
    layers, compressor = make(dict(keep=0.25, first=0, power=0.1))
    assert compressor.tokens(GRID)[0] < 24 // 2
    groups = recorded(compressor, layers, torch.randn(1, 25, 24))
    assert groups[0].max() + 1 == compressor.tokens(GRID)[0]


def test_similar_tokens_merge_first() -> None:
    """Two halves of an image, each alike: groups do not cross the border."""
    layers, compressor = make(dict(keep=0.5, first=0))
    half = torch.arange(24) % 6 >= 3
    x = torch.randn(1, 25, 24) * 0.05
    x[0, 1:] += torch.where(half[:, None], torch.randn(24), torch.randn(24))
    first = recorded(compressor, layers, x)[0][0]
    for group in first.unique():
        assert len(half[first == group].unique()) == 1


@torch.no_grad()
def test_important_tokens_stay_alone() -> None:
    """Against similarity, the more the higher the strength."""
    layers, compressor = make(dict(keep=0.7, first=0))
    x = torch.randn(1, 25, 24)
    direction = torch.randn(4, 24)
    # Without directions a strength means nothing.
    assert not compressor.calibrated
    alone = recorded(compressor, layers, x)
    compressor.set_strength(3.0)
    for a, b in zip(recorded(compressor, layers, x), alone):
        assert torch.equal(a, b)
    compressor.set_strength(0.0)
    compressor.learn(direction, random_components())
    assert compressor.calibrated
    plain = recorded(compressor, layers, x)
    compressor.set_strength(3.0)
    groups = recorded(compressor, layers, x)[0][0]
    normed = nn.functional.layer_norm(x[0, 1:], (24,))
    top = (normed @ direction[0]).topk(5).indices
    sizes = groups.bincount()
    assert (sizes[groups[top]] == 1).all()
    before = plain[0][0]
    assert not (before.bincount()[before[top]] == 1).all()
    # It is part of the checkpoint.
    _, other = make(dict(keep=0.7, first=0))
    other.load_state_dict(compressor.state_dict())
    assert torch.equal(recorded(other, layers, x)[0][0], groups)
    assert other.calibrated
    other.set_strength(0.0)
    assert torch.equal(recorded(other, layers, x)[0], plain[0])


@torch.no_grad()
def test_tokens_alike_in_the_components_merge() -> None:
    """Whatever tells them apart otherwise; also from a checkpoint."""
    layers, compressor = make(dict(keep=0.75, first=0, step=0.0))
    plain = compressor.state_dict()
    plain = {name: value.clone() for name, value in plain.items()}
    components = random_components()
    components[..., 3:] = 0
    compressor.learn(torch.zeros(4, 24), components)
    assert compressor.share <= 0.75
    x = torch.randn(2, 25, 24)
    groups = recorded(compressor, layers, x)[0]
    normed = nn.functional.layer_norm(x[:, 1:], (24,))
    count = 24 - compressor.tokens(GRID)[0]
    merge = match(normed @ components[0], count, 1)
    assert torch.equal(groups, merge.place[:, 1:] - 1)
    assert not torch.equal(groups, match(normed, count, 1).place[:, 1:] - 1)
    _, other = make(dict(keep=0.75, first=0, step=0.0))
    other.load_state_dict(compressor.state_dict())
    assert torch.equal(recorded(other, layers, x)[0], groups)
    assert other.loads() == compressor.loads()
    other.load_state_dict(plain)
    assert other.schedule.compare == 'sketch'
    # Finding them costs, too much for the lowest budgets.
    for keep in torch.arange(0.05, 0.8, 0.001).tolist():
        try:
            _, least = make(dict(keep=keep, first=0, step=0.0))
            break
        except ValueError:
            pass
    least.learn(torch.zeros(4, 24), components)
    assert least.schedule.compare == 'sketch' and least.share <= keep
    # They are there for other budgets, of the checkpoint as well.
    _, other = make(dict(keep=0.75, first=0, step=0.0))
    other.load_state_dict(least.state_dict())
    assert other.schedule.compare == 'sketch'
    assert other.loads() == least.loads()
    other.set_keep(0.75)
    assert other.schedule.compare == 'components' and other.share <= 0.75
    other.set_keep(keep)
    assert other.schedule.compare == 'sketch' and other.share <= keep


@pytest.mark.parametrize('compare', COMPARES)
def test_autocast_pairs_the_same_tokens(compare: str) -> None:
    """Rounded similarities would pair others."""
    layers, compressor = make_comparing(
        compare, shape_of(grid=(12, 12)), keep=0.5, first=0
    )
    x = torch.randn(2, 145, 24)
    full = recorded(compressor, layers, x, (12, 12))[0]
    with torch.autocast('cpu', torch.bfloat16):
        mixed = recorded(compressor, layers, x, (12, 12))[0]
    assert torch.equal(mixed, full)


# ---------------------------------------------------------------------- state


def test_a_checkpoint_counts_more_than_the_config() -> None:
    """Its schedule, its power, and that it was compressed."""
    _, saved = make(dict(keep=0.45, power=1.2))
    saved.settle()
    _, other = make(dict(keep=0.8))
    assert not other.compressed
    other.load_state_dict(saved.state_dict())
    assert other.compressed and other.tokens((9, 9)) == saved.tokens((9, 9))
    assert other.keep == pytest.approx(saved.share, abs=1e-4)
    assert other.schedule.power == pytest.approx(1.2)
    other.set_keep(0.6)
    expected = make(dict(keep=0.6, power=1.2))[1]
    assert other.tokens((9, 9)) == expected.tokens((9, 9))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_a_cast_keeps_the_schedule(dtype: torch.dtype) -> None:
    grid = (37, 53)
    _, module = make(dict(keep=0.55), shape_of(12))
    before = module.tokens(grid)
    module.to(dtype)
    assert module.gain.dtype == dtype
    _, other = make(dict(keep=0.9), shape_of(12))
    other.load_state_dict(module.state_dict())
    assert other.tokens(grid) == module.tokens(grid) == before


def test_gain_is_trained_where_it_is_used() -> None:
    """Each merge has its own."""
    layers, compressor = make(dict(keep=0.6, first=2))
    x = torch.randn(2, 25, 24)
    compressor.run(layers, x, GRID).last.sin().sum().backward()
    counts = [24, *compressor.tokens(GRID)]
    merges = [a > b for a, b in zip(counts, counts[1:])]
    assert merges == [False, False, True, True]
    assert (compressor.gain.grad != 0).tolist() == merges
    for options, trained in (
        (dict(keep=0.5), True),
        (dict(keep=1.0), False),
        (dict(keep=0.5, restore='replace'), False),
        (dict(type='tome', keep=0.6), False),
    ):
        assert make(options)[1].gain.requires_grad == trained


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(schedule='linear'), "schedule='linear' must be one of .*power"),
        (dict(compare='cosine'), "compare='cosine' must be one of .*sketch"),
        (dict(restore='none'), "restore='none' must be one of .*residual"),
        (dict(first=4), 'first=4 must be one of .0, 1, 2, 3'),
        (dict(power=0), 'power=0 must be a number above 0'),
        (dict(power='high'), "power='high' must be a number above 0"),
        (dict(balance=-1), 'balance=-1 must be a number >= 0'),
        (dict(balance='even'), "balance='even' must be a number >= 0"),
    ],
)
def test_options_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressiveCompressor(shape_of(), **options)


def test_it_prints_how_it_merges() -> None:
    text = repr(make(dict(keep=0.5))[1])
    assert "keep=0.5, schedule='power', compare='sketch'" in text
