"""Properties of merge and restore."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_seg.core import TokenCompressor, TokenMap


def make_map(
    grid=(4, 5),
    prefix=1,
    keep=0.5,
    prune=0.2,
    builder='nearest_centre',
    restore='residual',
    weights=None,
    seed=0,
    dtype=torch.float64,
) -> TokenMap:
    torch.manual_seed(seed)
    compressor = TokenCompressor(
        1,
        grid,
        prefix,
        keep=keep,
        budget='layer',
        prune=prune,
        builder=builder,
        restore=restore,
        weights=weights,
    )
    compressor.set_scores(torch.rand(1, grid[0] * grid[1]) + 0.01)
    return compressor.to(dtype).token_maps(grid)[0]


maps = st.builds(
    make_map,
    grid=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    prefix=st.integers(0, 3),
    keep=st.sampled_from([0.3, 0.5, 0.7, 0.9]),
    prune=st.just(0.0),
    builder=st.sampled_from(['nearest_centre', 'row_window']),
    restore=st.sampled_from(['replace', 'residual']),
    weights=st.sampled_from([None, 'mean', 'score']),
    seed=st.integers(0, 1000),
)
pruned_maps = st.builds(
    make_map,
    grid=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    prefix=st.integers(0, 3),
    keep=st.sampled_from([0.3, 0.5]),
    prune=st.sampled_from([0.1, 0.3]),
    builder=st.sampled_from(['nearest_centre', 'row_window']),
    restore=st.sampled_from(['replace', 'residual']),
    seed=st.integers(0, 1000),
)
some_maps = st.one_of(maps, pruned_maps)


def tokens_of(token_map: TokenMap, channels: int = 3) -> torch.Tensor:
    return torch.randn(
        2, token_map.slot.numel(), channels, dtype=torch.float64
    )


@given(some_maps)
@settings(max_examples=60, deadline=None)
def test_partition(token_map: TokenMap) -> None:
    """Every token is in exactly one group or pruned, no group is empty."""
    live = token_map.live
    if live is None:
        live = torch.ones_like(token_map.slot, dtype=torch.bool)
    used = token_map.slot[live].unique()
    assert torch.equal(used, torch.arange(token_map.num_slots))
    assert (token_map.merge_weight[~live] == 0).all()
    assert (token_map.restore_weight[~live] == 0).all()
    assert (token_map.merge_weight[live] > 0).all()


@given(some_maps)
@settings(max_examples=60, deadline=None)
def test_sparse_equals_dense(token_map: TokenMap) -> None:
    x = tokens_of(token_map)
    dense = token_map.to_dense()
    z = token_map.merge(x)
    given = token_map.segments.given
    torch.testing.assert_close(z, dense.merge(x)[:, given])
    y = torch.randn_like(z)
    unsorted = given.argsort()
    torch.testing.assert_close(
        token_map.restore(x, z, y),
        dense.restore(x, z[:, unsorted], y[:, unsorted]),
    )


@given(some_maps)
@settings(max_examples=60, deadline=None)
def test_restore_is_the_pseudo_inverse(token_map: TokenMap) -> None:
    """R = pinv(M), hence R M is a projection that never adds energy."""
    dense = token_map.to_dense()
    torch.testing.assert_close(
        dense.restore_matrix, torch.linalg.pinv(dense.merge_matrix)
    )
    x = tokens_of(token_map)
    once = dense.restore_matrix @ (dense.merge_matrix @ x)
    twice = dense.restore_matrix @ (dense.merge_matrix @ once)
    torch.testing.assert_close(once, twice)
    assert once.norm() <= x.norm() * (1 + 1e-6)


@given(some_maps)
@settings(max_examples=60, deadline=None)
def test_round_trip(token_map: TokenMap) -> None:
    """A block that does nothing changes nothing a restore can represent."""
    x = tokens_of(token_map)
    z = token_map.merge(x)
    restored = token_map.restore(x, z, z)
    if token_map.mode == 'residual':
        torch.testing.assert_close(restored, x)
        return
    again = token_map.restore(restored, token_map.merge(restored), z)
    torch.testing.assert_close(token_map.merge(restored), z)
    torch.testing.assert_close(again, restored)


@given(some_maps)
@settings(max_examples=40, deadline=None)
def test_pruned_and_single_tokens(token_map: TokenMap) -> None:
    """Pruned tokens keep their value, tokens alone get the block's output."""
    x = tokens_of(token_map)
    z = token_map.merge(x)
    y = torch.randn_like(z)
    restored = token_map.restore(x, z, y)
    live = token_map.live
    if live is None:
        live = torch.ones_like(token_map.slot, dtype=torch.bool)
    assert torch.equal(restored[:, ~live], x[:, ~live])
    size = token_map.slot[live].bincount(minlength=token_map.num_slots)
    alone = live & (size[token_map.slot] == 1)
    for token in (alone & (token_map.merge_weight == 1)).nonzero()[:, 0]:
        slot = token_map.slot[token]
        assert torch.equal(z[:, slot], x[:, token])
        torch.testing.assert_close(restored[:, token], y[:, slot])


@pytest.mark.parametrize('prefix', [1, 2, 5])
@pytest.mark.parametrize('restore', ['replace', 'residual'])
def test_prefix_tokens_untouched(prefix: int, restore: str) -> None:
    token_map = make_map(prefix=prefix, restore=restore)
    x = tokens_of(token_map)
    z = token_map.merge(x)
    assert torch.equal(z[:, :prefix], x[:, :prefix])
    y = torch.randn_like(z)
    restored = token_map.restore(x, z, y)[:, :prefix]
    torch.testing.assert_close(restored, y[:, :prefix])


@pytest.mark.parametrize('restore', ['replace', 'residual'])
def test_all_tokens_are_the_dense_block(restore: str) -> None:
    """keep=1 has no token map: bit for bit the uncompressed block."""
    assert make_map(keep=1.0, prune=0.0, restore=restore) is None


def test_detail_path() -> None:
    """Singles and pruned tokens get none, members what sets them apart."""
    plain = make_map(prune=0.2, keep=0.4, prefix=2)
    down, up = torch.randn(3, 2).double(), torch.randn(2, 3).double()
    detailed = replace(plain, detail=(down, up))
    x = tokens_of(plain)
    z = plain.merge(x)
    y = torch.randn_like(z)
    extra = detailed.restore(x, z, y) - plain.restore(x, z, y)
    expected = (x - z[:, plain.slot]) @ down @ up
    torch.testing.assert_close(extra[:, plain.live], expected[:, plain.live])
    assert (extra[:, ~plain.live] == 0).all() and (~plain.live).any()
    assert extra[:, :2].abs().max() < 1e-12
    assert extra.abs().max() > 0.1


@pytest.mark.parametrize('restore', ['replace', 'residual'])
@pytest.mark.parametrize('builder', ['nearest_centre', 'row_window'])
def test_gradcheck(restore: str, builder: str) -> None:
    base = make_map(grid=(3, 4), restore=restore, builder=builder)
    merge = base.merge_weight.detach().requires_grad_()
    weight = base.restore_weight.detach().requires_grad_()
    x = tokens_of(base, 2).requires_grad_()

    def run(x, merge, weight):
        token_map = replace(base, merge_weight=merge, restore_weight=weight)
        z = token_map.merge(x)
        return token_map.restore(x, z, z.sin())

    assert torch.autograd.gradcheck(run, (x, merge, weight))


def test_wrong_number_of_tokens() -> None:
    token_map = make_map()
    with pytest.raises(ValueError, match=r'merge expects \(B, 21, C\)'):
        token_map.merge(torch.randn(2, 20, 3))
    x = torch.randn(2, 21, 3, dtype=torch.float64)
    z = token_map.merge(x)
    with pytest.raises(ValueError, match='restore expects'):
        token_map.restore(x, z, z[:, 1:])
