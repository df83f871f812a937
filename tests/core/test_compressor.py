"""Structures, weights and state of the token compressor."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_seg.core import TokenCompressor
from pm_seg.core.token_map import ImageMap

GRID = (4, 6)


def compressor(scores: bool = True, depth: int = 3, **options):
    torch.manual_seed(1)
    options = {'keep': 0.5, 'budget': 'layer', **options}
    out = TokenCompressor(depth, options.pop('grid', GRID), 1, **options)
    if scores:
        out.set_scores(torch.rand(depth, out.num_tokens) + 0.01)
    return out


def test_needs_a_structure() -> None:
    module = compressor(scores=False)
    assert not module.has_structure
    with pytest.raises(RuntimeError, match='there is no structure yet'):
        module.token_maps(GRID)
    x, layers = torch.rand(1, 25, 2), [torch.nn.Identity()] * 3
    with module.disabled():
        assert module.run(layers, x, GRID)[0] is x
    with pytest.raises(RuntimeError, match='there is no structure yet'):
        module.run(layers, x, GRID)


def test_layers_left_dense() -> None:
    module = compressor(layers=[1, 2], budget='layer')
    maps = module.token_maps(GRID)
    assert maps[0] is None
    assert [m.num_slots for m in maps[1:]] == [13, 13]
    assert module.num_groups == [24, 12, 12]


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(['nearest_centre', 'row_window']),
    st.sampled_from(['global', 'layer']),
    st.sampled_from(['score', 'spread']),
    st.sampled_from([0.0, 0.2]),
    st.integers(0, 100),
)
@settings(max_examples=60, deadline=None)
def test_other_grids_stay_partitions(
    grid, builder, budget, centres, prune: float, seed: int
) -> None:
    module = compressor(
        builder=builder,
        budget=budget,
        centres=centres,
        prune=prune,
        keep=0.6,
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        module.merge_weight += 0.1 * torch.rand_like(module.merge_weight)
    for native, token_map in zip(module.num_groups, module.token_maps(grid)):
        total = grid[0] * grid[1]
        if token_map is None:
            assert round(native * total / 24) >= total or total == 1
            continue
        assert token_map.slot.numel() == total + 1
        live = token_map.live
        if live is None:
            live = torch.ones(total + 1, dtype=torch.bool)
        used = token_map.slot[live].unique()
        assert torch.equal(used, torch.arange(token_map.num_slots))
        assert (token_map.merge_weight[~live] == 0).all()
        expected = max(round(native * total / 24), 1)
        # bilinear enlargement can make equal scores, hence equal ranks
        assert token_map.num_slots - 1 >= expected
        x = torch.randn(2, total + 1, 4)
        z = token_map.merge(x)
        assert token_map.restore(x, z, z).shape == x.shape


def test_spans_share_a_map() -> None:
    module = compressor(depth=6, layers=[1, 2, 3, 5], span=2)
    assert module.spans == ((1, 2), (3,), (5,))
    layers = [stage.layers for stage in module.stages(GRID)]
    assert layers == [(0,), (1, 2), (3,), (4,), (5,)]
    assert torch.equal(module.group[1], module.group[2])
    maps = module.token_maps((5, 5))
    assert maps[1] is maps[2] and maps[3] is not maps[2]
    assert maps[0] is None and maps[4] is None
    whole = compressor(depth=6, span=99, num_groups=[7])
    assert whole.num_groups == [7] * 6
    with pytest.raises(ValueError, match='span=0 must be at least 1'):
        compressor(span=0)


def test_weights_can_be_frozen() -> None:
    module = compressor(trainable=False)
    assert not any(p.requires_grad for p in module.parameters())


def test_same_grid_and_wider_grid_are_derived_once() -> None:
    module = compressor()
    native = module._layout(GRID)
    first = module.token_maps((6, 4))[0].slot
    assert module.token_maps((6, 4))[0].slot.data_ptr() == first.data_ptr()
    for width in range(1, 40):
        module.token_maps((2, width))
    assert len(module._layouts) <= module.max_cached_layouts
    assert module._layout(GRID) is native


def test_groups_without_scores_fit_their_own_grid_only() -> None:
    module = compressor(scores=False)
    module.set_groups(
        torch.arange(24).div(2, rounding_mode='floor').repeat(3, 1)
    )
    assert module.num_groups == [12] * 3
    assert module.token_maps(GRID)[0].num_slots == 13
    with pytest.raises(RuntimeError, match='set without scores'):
        module.token_maps((5, 5))


def test_learned_weights_carry_over_to_other_grids() -> None:
    module = compressor(weights='mean')
    grid = (8, 12)
    first = module.token_maps(grid)[1]
    with torch.no_grad():
        module.restore_weight += 0.25
        module.merge_weight += 0.125
    second = module.token_maps(grid)[1]
    before, after = first.restore_weight, second.restore_weight
    torch.testing.assert_close(after[1:], before[1:] + 0.25)
    before, after = first.merge_weight, second.merge_weight
    torch.testing.assert_close(after[1:], before[1:] + 0.125)
    (second.restore_weight.sum() + after.sum()).backward()
    assert module.restore_weight.grad[1].abs().sum() > 0
    assert module.merge_weight.grad[1].abs().sum() > 0


def test_pruned_tokens_get_no_gradient() -> None:
    module = compressor(prune=0.3)
    pruned = module.group == -1
    assert pruned.any()
    x = torch.randn(2, 25, 4)
    for token_map in module.token_maps(GRID):
        z = token_map.merge(x)
        x = token_map.restore(x, z, z.sin())
    x.square().sum().backward()
    assert (module.merge_weight.grad[pruned] == 0).all()
    assert (module.restore_weight.grad[pruned] == 0).all()
    assert (module.merge_weight.grad[~pruned] != 0).any()


@pytest.mark.parametrize('matrices', ['sparse', 'dense'])
def test_state_dict_round_trip(matrices: str) -> None:
    options = dict(
        matrices=matrices,
        num_groups=[12, 10, 8] if matrices == 'dense' else None,
        prune=0.1,
    )
    module = compressor(**options)
    other = compressor(scores=False, **options)
    shapes = {k: v.shape for k, v in other.state_dict().items()}
    other.load_state_dict(module.state_dict())
    assert {k: v.shape for k, v in other.state_dict().items()} == shapes
    assert other.num_groups == module.num_groups
    x = torch.randn(2, 25, 4)
    for a, b in zip(module.token_maps(GRID), other.token_maps(GRID)):
        assert torch.equal(a.merge(x), b.merge(x))
    clone = copy.deepcopy(module)
    assert clone.num_groups == module.num_groups


@pytest.mark.parametrize('restore', ['replace', 'residual'])
def test_dense_form_starts_as_the_sparse_one(restore: str) -> None:
    sparse = compressor(restore=restore, prune=0.1, budget='layer')
    dense = compressor(
        scores=False, restore=restore, prune=0.1, budget='layer',
        matrices='dense',
        num_groups=sparse.num_groups,
    )  # fmt: skip
    dense.set_scores(sparse.scores)
    x = torch.randn(2, 25, 4)
    for a, b in zip(sparse.token_maps(GRID), dense.token_maps(GRID)):
        z = a.merge(x)
        given, order = a.segments.given, a.segments.given.argsort()
        torch.testing.assert_close(b.merge(x)[:, given], z)
        y = torch.randn_like(z)
        torch.testing.assert_close(
            b.restore(x, z[:, order], y[:, order]), a.restore(x, z, y)
        )


def test_dense_form_on_another_grid() -> None:
    """Resizing keeps constants: a flat map stays flat."""
    dense = compressor(
        matrices='dense', num_groups=[12, 10, 8], weights='mean'
    )
    grid = (7, 5)
    x = torch.ones(1, 36, 2)
    for token_map in dense.token_maps(grid):
        z = token_map.merge(x)
        assert z.shape[1] == token_map.num_slots
        out = token_map.restore(x, z, 2 * z)
        assert out.shape == x.shape and torch.isfinite(out).all()


def test_structure_follows_new_scores_and_keep() -> None:
    module = compressor(budget='layer')
    shapes = {k: v.shape for k, v in module.state_dict().items()}
    module.keep = 0.25
    module.build()
    assert module.num_groups == [6, 6, 6]
    assert {k: v.shape for k, v in module.state_dict().items()} == shapes


def test_follows_the_dtype() -> None:
    module = compressor().to(torch.bfloat16)
    x = torch.randn(2, 25, 4, dtype=torch.bfloat16)
    for token_map in (*module.token_maps(GRID), *module.token_maps((5, 5))):
        tokens = token_map.slot.numel()
        z = token_map.merge(x[:, :1].expand(-1, tokens, -1))
        assert z.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(keep=0), 'keep=0 is not in'),
        (dict(keep=0.9, prune=0.2), 'is above 1'),
        (dict(layers=[3]), 'must name at least one of the layers 0..2'),
        (dict(layers=[]), 'must name at least one'),
        (dict(builder='x'), "builder='x' is unknown"),
        (dict(budget='x'), "budget='x' is unknown"),
        (dict(restore='x'), "restore='x' is unknown"),
        (dict(weights='x'), "weights='x' is unknown"),
        (dict(matrices='x'), "matrices='x' is unknown"),
        (dict(matrices='dense'), 'needs num_groups'),
        (dict(num_groups=[1, 2]), 'must hold 3 counts'),
        (dict(num_groups=[1, 2, 25]), 'must hold 3 counts'),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressor(scores=False, **options)


def test_a_layer_that_would_keep_nothing() -> None:
    module = compressor(scores=False, decay=0.4, budget='global')
    with pytest.raises(ValueError, match='layer 2 would keep none'):
        module.set_scores(torch.rand(3, 24) * 0.01 + 1)


def test_bad_scores_and_groups() -> None:
    module = compressor(scores=False)
    with pytest.raises(ValueError, match=r'expected \(3, 24\)'):
        module.set_scores(torch.rand(3, 25))
    with pytest.raises(ValueError, match='all zero'):
        module.set_scores(torch.zeros(3, 24))
    assert not module.has_structure
    with pytest.raises(ValueError, match='without gaps'):
        module.set_groups(torch.full((3, 24), 2))
    with pytest.raises(ValueError, match='group has shape'):
        module.set_groups(torch.zeros(3, 5, dtype=torch.long))
    fixed = compressor(scores=False, num_groups=[3, 3, 3])
    with pytest.raises(ValueError, match='num_groups says'):
        fixed.set_groups(torch.arange(24).repeat(3, 1))


class Block(torch.nn.Module):
    """A block that mixes tokens a little."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.tanh() + 0.1 * x.mean(1, keepdim=True)


@pytest.mark.parametrize('keep', [0.8, 0.5, 0.2])
def test_matching_groups_similar_tokens_of_each_image(keep: float) -> None:
    module = compressor(
        scores=False, builder='matching', keep=keep, dims=4, detail=2
    )
    assert module.has_scores and not module.has_structure
    module.build()
    count = int(24 * keep)
    assert module.num_groups == [count] * 3
    assert not module.merge_weight.requires_grad
    x = torch.randn(2, 25, 4)
    for stage in module.stages(GRID):
        bound = stage.token_map.bind(x)
        for row in bound.position:
            assert row[0] == 0
            assert row.unique().tolist() == list(range(count + 1))
        z = bound.merge(x)
        assert z.shape == (2, count + 1, 4)
        torch.testing.assert_close(bound.restore(x, z, z), x)
        for image, row in enumerate(bound.position):
            mean = x[image][row == 1].mean(0)
            torch.testing.assert_close(z[image, 1], mean)
    layers = [Block() for _ in range(3)]
    whole = module.run(layers, x, GRID)[0]
    for image in range(2):
        alone = module.run(layers, x[image : image + 1], GRID)[0]
        torch.testing.assert_close(alone, whole[image : image + 1])
    other = module.run(layers, torch.randn(1, 41, 4), (5, 8))[0]
    assert other.shape == (1, 41, 4)
    again = compressor(
        scores=False, builder='matching', keep=0.9, dims=4, detail=2
    )
    again.load_state_dict(module.state_dict())
    torch.testing.assert_close(again.run(layers, x, GRID)[0], whole)


def test_matching_loses_nothing_where_tokens_are_equal() -> None:
    module = compressor(scores=False, builder='matching', keep=0.5)
    module.build()
    x = torch.randn(1, 12, 4).repeat_interleave(2, 1)
    x = torch.cat([torch.randn(1, 1, 4), x], 1)

    def block(x: torch.Tensor) -> torch.Tensor:
        return x + x.sin()

    out = module.run([block] * 3, x, GRID)[0]
    expected = block(block(block(x)))
    torch.testing.assert_close(out, expected)


def test_matching_has_a_form_of_its_own() -> None:
    with pytest.raises(ValueError, match="builder='matching' works with"):
        compressor(scores=False, builder='matching', restore='replace')


def adaptive(**options) -> TokenCompressor:
    return compressor(dims=4, detail=2, **options)


@pytest.mark.parametrize('rounds', [1, 2, 5])
def test_adaptive_groups_follow_the_image(rounds: int) -> None:
    module = adaptive(adapt=rounds)
    assert module.adapt == rounds
    torch.manual_seed(3)
    kinds = torch.eye(4)[torch.randint(4, (2, 24))]
    x = torch.cat([torch.randn(2, 1, 4), kinds], 1)
    moved = module.token_maps(GRID)[0].bind(x)
    static = module.token_maps(GRID)[0].segments
    assert moved.position[:, 0].eq(0).all()
    assert moved.position.max() < moved.num_slots == static.num_slots

    def spread_out(position: torch.Tensor) -> torch.Tensor:
        means = [
            torch.stack([row[p == k].mean(0) for k in p])
            for row, p in zip(x, position)
        ]
        return (torch.stack(means) - x).square().sum()

    before = spread_out(static.slot.expand(2, -1))
    assert spread_out(moved.position) < 0.4 * before
    z = moved.merge(x)
    torch.testing.assert_close(moved.restore(x, z, z), x)
    used = z[0][moved.position[0]]
    torch.testing.assert_close(moved.spread(z)[0], used)


def test_adaptive_groups_of_an_image_depend_on_it_alone() -> None:
    module = adaptive()
    assert module.adapt == 1
    layers, x = [Block() for _ in range(3)], torch.randn(3, 25, 4)
    whole = module.run(layers, x, GRID)[0]
    for image in range(3):
        alone = module.run(layers, x[image : image + 1], GRID)[0]
        torch.testing.assert_close(alone, whole[image : image + 1])
    other = module.run(layers, torch.randn(1, 41, 4), (5, 8))[0]
    assert other.shape == (1, 41, 4)
    again = adaptive()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.run(layers, x, GRID)[0], whole)


def test_adaptive_weights_are_trained() -> None:
    module = adaptive()
    x = torch.randn(2, 25, 4, requires_grad=True)
    module.run([Block() for _ in range(3)], x, GRID)[
        0
    ].square().sum().backward()
    assert (module.restore_weight.grad != 0).any()
    assert (module.merge_weight.grad != 0).any()
    assert torch.isfinite(x.grad).all()


def test_static_and_adaptive_groups_share_checkpoints() -> None:
    """Groups that do not move are the static ones, on any grid."""
    static, moving = adaptive(adapt=0), adaptive(scores=False, adapt=2)
    with torch.no_grad():
        static.merge_weight *= 1 + 0.1 * torch.rand(3, 24)
        static.restore_weight += 0.1 * torch.rand(3, 24)
    moving.load_state_dict(static.state_dict())
    for grid in (GRID, (6, 8)):
        for a, b in zip(static.token_maps(grid), moving.token_maps(grid)):
            slot = a.slot.clone()
            x = torch.randn(2, len(slot), 4)
            unmoved = ImageMap(
                slot.expand(2, -1),
                b.num_slots,
                b.merge_weight,
                b.restore_weight,
                a.detail,
            )
            z = a.merge(x)
            torch.testing.assert_close(unmoved.merge(x), z)
            torch.testing.assert_close(
                unmoved.restore(x, z, z.sin()), a.restore(x, z, z.sin())
            )


def test_adaptive_groups_need_a_form_they_fit() -> None:
    assert compressor().adapt == 0  # without dims
    assert adaptive(prune=0.1).adapt == 0
    assert adaptive(restore='replace').adapt == 0
    assert adaptive(builder='row_window').adapt == 0
    assert adaptive(builder='row_window', adapt=1).adapt == 1
    for options in (
        dict(adapt=-1),
        dict(adapt=1, prune=0.1),
        dict(adapt=1, restore='replace'),
        dict(adapt=1, builder='matching'),
    ):
        with pytest.raises(ValueError, match=r'adapt=-?1 must be 0'):
            adaptive(scores=False, **options)
