"""Properties that hold for any structure, grid, dtype and kind of map.

The tests beside this one check builders and weights on their own; here
everything is drawn at random, and forms that must agree are compared.
"""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_seg.core import MergingCompressor, TokenCompressor
from pm_seg.core.budget import LEVELS
from pm_seg.core.matching import match_down, match_windows, pool

grids = st.tuples(st.integers(1, 7), st.integers(1, 7))
seeds = st.integers(0, 10**6)
TOLERANCE = {
    torch.float64: dict(rtol=1e-9, atol=1e-9),
    torch.float32: dict(rtol=1e-4, atol=1e-4),
    torch.bfloat16: dict(rtol=0.05, atol=0.1),
}
dtypes = st.sampled_from(list(TOLERANCE))


def random_groups(grid, pruned: float, seed: int) -> torch.Tensor:
    """Any assignment at all: groups need not be connected, (N,)."""
    generator = torch.Generator().manual_seed(seed)
    total = grid[0] * grid[1]
    count = int(torch.randint(1, total + 1, (1,), generator=generator))
    group = torch.randint(count, (total,), generator=generator)
    group[torch.rand(total, generator=generator) < pruned] = -1
    group[0] = 0
    used = group.unique()
    return torch.searchsorted(used[used >= 0], group).where(group >= 0, -1)


def given_structure(grid, prefix, pruned, restore, seed, **options):
    """One layer with arbitrary groups and arbitrary weights."""
    group = random_groups(grid, pruned, seed)
    count = [int(group.max()) + 1]
    module = TokenCompressor(
        1, grid, prefix, restore=restore, num_groups=count, **options
    )
    module.set_groups(group[None])
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.rand_like(parameter)
    return module


def one_hot(grid, prefix: int = 0) -> torch.Tensor:
    """Every token a channel of its own: outputs tell where they are from."""
    return torch.eye(prefix + grid[0] * grid[1], dtype=torch.float64)[None]


def assert_averages(out: torch.Tensor) -> None:
    """Each row is the mean of a group, and the groups are a partition."""
    close = dict(rtol=0, atol=1e-5)  # weights come from float32
    sums = torch.ones(len(out), dtype=out.dtype)
    torch.testing.assert_close(out.sum(1), sums, **close)
    torch.testing.assert_close(out @ out, out, **close)
    torch.testing.assert_close(out, out.T, **close)
    for token, row in enumerate(out):
        members = row > 1e-9
        assert members[token], 'a token is in the group it gets back'
        mean = members.double() / members.sum()
        torch.testing.assert_close(row, mean, **close)


class Pass(torch.nn.Module):
    """A layer that changes nothing; keys are the tokens."""

    def attend(self, x, key_bias=None):
        return x, x.unsqueeze(1)

    def feed_forward(self, x):
        return x

    def forward(self, x):
        return x


# ------------------------------------------------------- sparse against dense


@given(
    grids,
    st.integers(0, 4),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from(['replace', 'residual']),
    dtypes,
    seeds,
)
@settings(max_examples=100)
def test_sparse_and_dense_form_agree_with_gradients(
    grid, prefix, batch, pruned, restore, dtype, seed
) -> None:
    module = given_structure(grid, prefix, pruned, restore, seed)
    token_map = module.to(dtype).token_maps(grid)[0]
    if token_map is None:  # as many groups as tokens: the layer runs dense
        assert module.num_groups == [grid[0] * grid[1]]
        return
    x = torch.randn(batch, prefix + grid[0] * grid[1], 3).to(dtype)
    live = token_map.live
    results = []
    for form in ('sparse', 'dense'):
        weights = [
            w.detach().clone().requires_grad_()
            for w in (token_map.merge_weight, token_map.restore_weight)
        ]
        used = replace(
            token_map, merge_weight=weights[0], restore_weight=weights[1]
        )
        order = torch.arange(used.num_slots)
        if form == 'dense':
            order = used.segments.given
            used = used.to_dense()
        tokens = x.clone().requires_grad_()
        z = used.merge(tokens)
        out = used.restore(tokens, z, z.sin())
        out.cos().sum().backward()
        if live is not None:  # weights of pruned tokens mean nothing
            for weight in weights:
                weight.grad *= live
        assert out.dtype == z.dtype == dtype
        results.append([z[:, order], out, tokens.grad, weights[0].grad])
        results[-1].append(weights[1].grad)
    for sparse, dense in zip(*results):
        scale = dense.abs().max().clamp_min(1).item()
        torch.testing.assert_close(
            sparse / scale, dense / scale, **TOLERANCE[dtype]
        )


@given(grids, st.integers(0, 3), st.sampled_from([0.0, 0.3]), seeds)
@settings(max_examples=60)
def test_any_groups_merge_to_means_and_come_back(
    grid, prefix, pruned, seed
) -> None:
    """Mean weights: a merge and a 'replace' restore average the groups."""
    group = random_groups(grid, pruned, seed)
    module = TokenCompressor(
        1, grid, prefix, restore='replace', weights='mean'
    ).double()
    module.set_groups(group[None])
    x = one_hot(grid, prefix)
    with torch.no_grad():
        out = module.run([Pass()], x, grid)[0][0]
    assert_averages(out)
    same = out[prefix:, prefix:] > 0
    expected = (group[:, None] == group[None]) & (group >= 0)
    assert torch.equal(same, expected | torch.eye(len(group)).bool())
    residual = TokenCompressor(1, grid, prefix).double()
    residual.set_groups(group[None])
    torch.testing.assert_close(residual.run([Pass()], x, grid)[0], x)


@given(grids, grids, st.integers(0, 2), seeds)
@settings(max_examples=40)
def test_dense_form_fits_any_grid(native, grid, prefix, seed) -> None:
    """A block that does nothing changes nothing, and gradients arrive."""
    module = given_structure(
        native, prefix, 0.2, 'residual', seed, matrices='dense'
    )
    x = torch.randn(2, prefix + grid[0] * grid[1], 3)
    token_map = module.token_maps(grid)[0]
    z = token_map.merge(x)
    assert z.shape == (2, prefix + module.num_groups[0], 3)
    torch.testing.assert_close(
        token_map.restore(x, z, z), x, rtol=1e-4, atol=1e-4
    )
    token_map.restore(x, z, z.sin() + 1).square().sum().backward()
    for parameter in module.parameters():
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


# ---------------------------------------------------- structures from scores


@given(
    grids,
    grids,
    st.sampled_from(['nearest_centre', 'row_window', 'matching']),
    st.sampled_from(['loss', 'layer']),
    st.sampled_from(['score', 'spread']),
    st.sampled_from([0.3, 0.6, 1.0]),
    st.integers(1, 2),
    st.sampled_from(['even', 'equal', 'steep', 'sparse']),
    seeds,
)
@settings(max_examples=100)
def test_any_scores_give_partitions_on_any_grid(
    native, grid, builder, budget, centres, keep, span, kind, seed
) -> None:
    """Also with scores that tie, that span 30 decades, or are mostly 0."""
    torch.manual_seed(seed)
    module = TokenCompressor(
        2, native, 1, keep=keep, builder=builder, budget=budget,
        centres=centres, span=span, seed=seed,
    ).double()  # fmt: skip
    scores = torch.rand(module.scores.shape).double()
    if kind == 'equal':
        scores = torch.ones_like(scores)
    elif kind == 'steep':
        scores = 10 ** (30 * scores - 15)
    elif kind == 'sparse':
        scores = scores * (scores > 0.8)
        scores[:, 0] = 0.5
    losses = torch.rand(2, len(LEVELS)).cumsum(1)
    module.set_scores(scores, losses)
    total = grid[0] * grid[1]
    x = torch.randn(2, total + 1, 4).double()
    for stage in module.stages(grid):
        if stage.token_map is None:
            continue
        token_map = stage.token_map.bind(x)
        z = token_map.merge(x)
        assert 2 <= z.shape[1] <= total + 1
        assert torch.isfinite(z).all()
        torch.testing.assert_close(token_map.restore(x, z, z), x)
        torch.testing.assert_close(z[:, 0], x[:, 0])
        # Every token gets the mean of exactly the tokens of its group.
        label = torch.arange(z.shape[1])[None, :, None].double()
        group = token_map.spread(label.expand(2, -1, 4))[..., 0].long()
        for image, tokens, merged in zip(group, x, z):
            assert image.unique().tolist() == list(range(z.shape[1]))
            for number in range(z.shape[1]):
                mean = tokens[image == number].mean(0)
                torch.testing.assert_close(merged[number], mean)
    out = module.run([Pass(), Pass()], x, grid)[0]
    torch.testing.assert_close(out, x)


@given(st.lists(grids, min_size=3, max_size=8), seeds)
@settings(max_examples=15)
def test_maps_do_not_depend_on_what_was_asked_before(order, seed) -> None:
    """Whether it comes from the cache, was dropped from it, or is new."""

    def fresh() -> TokenCompressor:
        torch.manual_seed(seed)
        module = TokenCompressor(2, (4, 5), 1, keep=0.5)
        module.max_cached_layouts = 2
        module.set_scores(torch.rand(2, 20) + 0.01)
        with torch.no_grad():
            module.restore_weight += 0.1 * torch.rand(2, 20)
        return module

    worn = fresh()
    for grid in order + order[::-1]:
        for a, b in zip(worn.token_maps(grid), fresh().token_maps(grid)):
            assert (a is None) == (b is None)
            if a is not None:
                assert torch.equal(a.slot, b.slot)
                assert torch.equal(a.restore_weight, b.restore_weight)
        assert len(worn._layouts) <= 2


# -------------------------------------------------------------- state dicts


def save_and_load(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@given(
    grids.filter(lambda grid: grid[0] * grid[1] >= 4),
    grids,
    st.fixed_dictionaries(
        dict(
            keep=st.sampled_from([0.4, 0.7]),
            prune=st.sampled_from([0.0, 0.2]),
            span=st.integers(1, 3),
            detail=st.sampled_from([0, 2]),
            centres=st.sampled_from(['score', 'spread']),
            builder=st.sampled_from(['nearest_centre', 'row_window']),
            restore=st.sampled_from(['replace', 'residual']),
        )
    ),
    dtypes,
    seeds,
)
@settings(max_examples=40)
def test_state_dict_is_all_there_is(native, grid, options, dtype, seed):
    """A saved compressor works alike on every grid, whatever its options."""
    torch.manual_seed(seed)

    def make() -> TokenCompressor:
        return TokenCompressor(3, native, 1, dims=4, **options).to(dtype)

    module, other = make(), make()
    module.set_scores(torch.rand(3, native[0] * native[1]) + 0.01)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    other.load_state_dict(save_and_load(module.state_dict()))
    assert other.num_groups == module.num_groups
    assert other.num_pruned == module.num_pruned
    for size in (native, grid):
        x = torch.randn(2, 1 + size[0] * size[1], 4).to(dtype)
        layers = [torch.sin] * 3
        expected = module.run(layers, x, size)[0]
        assert torch.equal(other.run(layers, x, size)[0], expected)


# ---------------------------------------------- merging by similarity


@given(
    st.tuples(st.integers(2, 7), st.integers(2, 7)),
    st.sampled_from(['tome', 'algm']),
    st.sampled_from([0.9, 0.6]),
    st.integers(0, 2),
    st.integers(2, 6),
    seeds,
)
@settings(max_examples=60)
def test_merging_returns_the_mean_of_each_group(
    grid, method, keep, prefix, depth, seed
) -> None:
    """Through all layers, tokens stand for the patches that went in."""
    torch.manual_seed(seed)
    module = MergingCompressor(depth, grid, prefix, keep=keep, method=method)
    total = grid[0] * grid[1]
    looks = torch.randn(1, prefix + total, 3).double()
    x = torch.cat([one_hot(grid, prefix), 100 * looks], -1)
    layers = [Pass()] * depth
    out, _ = module.run(layers, x, grid)
    weights = out[0, :, : prefix + total]
    assert_averages(weights)
    assert torch.equal(weights[:prefix], one_hot(grid, prefix)[0, :prefix])
    torch.testing.assert_close(
        out[0, :, prefix + total :], 100 * weights @ looks[0]
    )
    left = module.tokens_after(grid)
    assert left == sorted(left, reverse=True) and left[-1] >= 1
    groups = (weights > 0).unique(dim=0)
    assert len(groups) == prefix + left[-1]
    other = MergingCompressor(depth, grid, prefix, keep=0.5, method=method)
    other.load_state_dict(save_and_load(module.state_dict()))
    assert torch.equal(other.run(layers, x, grid)[0], out)


@given(
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(['random', 'equal', 'zero', 'few']),
    dtypes,
    seeds,
)
@settings(max_examples=80)
def test_match_down_always_gives_as_many_groups(
    tokens, share, kind, dtype, seed
) -> None:
    """Also where all similarities are equal, or there is no direction."""
    torch.manual_seed(seed)
    count = max(round(share * tokens), 1)
    x = torch.randn(2, tokens, 3).to(dtype)
    if kind == 'equal':
        x = x[:, :1].expand(-1, tokens, -1)
    elif kind == 'zero':
        x = torch.zeros_like(x)
    elif kind == 'few':
        x = x[:, torch.randint(3, (tokens,)).clamp_max(tokens - 1)]
    position = match_down(x, count)
    for row in position:
        assert row.unique().tolist() == list(range(count))
    merged, size = pool(x, x.new_ones(2, tokens, 1), position, count)
    assert torch.equal(size.sum(1), size.new_full((2, 1), tokens))
    expected = x.double().mean(1)
    mean = (merged.double() * size.double()).sum(1) / tokens
    torch.testing.assert_close(mean.to(dtype), expected.to(dtype), **(
        TOLERANCE[dtype]
    ))  # fmt: skip


@given(grids, seeds)
@settings(max_examples=60)
def test_windows_that_merge_are_the_most_uniform(grid, seed) -> None:
    """match_windows against the mean cosine of all pairs, by loops."""
    torch.manual_seed(seed)
    height, width = grid
    x = torch.randn(1, height * width, 3).double()
    unit = torch.nn.functional.normalize(x[0], dim=-1)
    windows = {}
    for top in range(0, height - 1, 2):
        for left in range(0, width - 1, 2):
            first = top * width + left
            members = (first, first + 1, first + width, first + width + 1)
            cosine = unit[list(members)] @ unit[list(members)].T
            windows[members] = cosine.triu(1).sum().item()
    for count in range(len(windows) + 1):
        position = match_windows(x, grid, count)[0]
        assert position.unique().tolist() == list(
            range(height * width - 3 * count)
        )
        best = sorted(windows, key=windows.get, reverse=True)[:count]
        for members in windows:
            together = len(position[list(members)].unique()) == 1
            assert together == (members in best)


@pytest.mark.parametrize('grid', [(1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize('options', [{}, dict(builder='matching')])
def test_smallest_grids(grid, options) -> None:
    """One patch, one row, one column."""
    module = TokenCompressor(2, (4, 4), 1, keep=0.5, **options)
    module.set_scores(torch.rand(2, 16) + 0.1)
    x = torch.randn(1, 1 + grid[0] * grid[1], 4)
    out = module.run([torch.sin, torch.sin], x, grid)[0]
    assert out.shape == x.shape and torch.isfinite(out).all()
    if grid == (1, 1):
        torch.testing.assert_close(out, x.sin().sin())
