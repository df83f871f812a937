"""Token maps, grids, parameters and state of the paper's compressor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy import PAPER_SHAPE, kept
from toy import paper_compressor as compressor

from pm_seg.core import StaticCompressor
from pm_seg.utils import count_macs

GRID = PAPER_SHAPE.grid


def run(module: StaticCompressor, x: torch.Tensor, grid=GRID) -> torch.Tensor:
    return module.run([torch.sin] * module.shape.depth, x, grid).last


# ------------------------------------------------------------------------ run


def test_layers_left_dense() -> None:
    module = compressor(layers=[2, 1], prune_rate=0.25)
    maps = module.token_maps(GRID)
    assert maps[0] is None
    assert [m.num_merged for m in maps[1:]] == [13, 13]
    assert kept(module) == [24, 12, 12]
    assert [load.attended for load in module.loads()] == kept(module)
    assert [load.pruned for load in module.loads()] == [0, 6, 6]


def test_all_tokens_are_the_layer_alone() -> None:
    module = compressor(keep_rate=1.0)
    assert module.token_maps(GRID) == [None] * 3
    assert module.share == 1.0
    x = torch.randn(2, 25, 4)
    assert torch.equal(run(module, x), x.sin().sin().sin())


def test_layers_are_run_on_merged_tokens_and_collected() -> None:
    module, x = compressor(), torch.randn(2, 25, 4)
    seen = []

    def layer(z: torch.Tensor) -> torch.Tensor:
        seen.append(z.shape[1])
        return z + 1

    out = module.run([layer] * 3, x, GRID, outputs=(0, 2))
    assert seen == [13] * 3 and out.groups is None
    assert out.layers.keys() == {0, 2}
    assert torch.equal(out.layers[2], out.last)
    first = module.token_maps(GRID)[0]
    z = first.merge(x)
    expected = first.restore(x, z + 1)
    torch.testing.assert_close(out.layers[0], expected)


@pytest.mark.parametrize('matrices', ['sparse', 'dense'])
def test_costs_are_those_counted_while_it_runs(matrices) -> None:
    module = compressor(matrices=matrices, num_groups=[24, 12, 6])
    layers = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    x = torch.randn(1, 25, 4)
    counted = count_macs(lambda: module.run(layers, x, GRID))
    macs = sum(load.macs for load in module.loads())
    if matrices == 'dense':  # shortcuts, which no counter sees
        macs -= 3 * 25 * 4
    assert macs == counted


# ---------------------------------------------------------------- other grids


@pytest.mark.parametrize('grid', [(1, 1), (1, 9), (9, 1)])
def test_smallest_grids(grid) -> None:
    """One patch, one row, one column."""
    module = compressor()
    x = torch.randn(1, 1 + grid[0] * grid[1], 4)
    out = run(module, x, grid)
    assert out.shape == x.shape and torch.isfinite(out).all()


def test_learned_weights_count_on_other_grids() -> None:
    module, x = compressor(), torch.randn(1, 97, 4)
    before = run(module, x, (8, 12))
    with torch.no_grad():
        module.restore_weight += 0.25
    after = run(module, x, (8, 12))
    assert not torch.allclose(before, after)
    after.square().sum().backward()
    for weight in module.parameters():
        assert weight.grad[1].abs().sum() > 0


def test_compiles_on_any_grid() -> None:
    module = compressor(prune_rate=0.2)
    compiled = torch.compile(
        lambda x, grid: run(module, x, grid), fullgraph=True, backend='eager'
    )
    for grid in (GRID, (5, 5)):
        x = torch.randn(2, 1 + grid[0] * grid[1], 4)
        expected = run(module, x, grid)
        torch.testing.assert_close(compiled(x, grid), expected)


# ------------------------------------------------------- parameters and state


def test_pruned_tokens_get_no_gradient() -> None:
    module = compressor(prune_rate=0.3)
    pruned = module.group == -1
    assert pruned.any()
    run(module, torch.randn(2, 25, 4)).square().sum().backward()
    assert (module.merge_weight.grad[pruned] == 0).all()
    assert (module.restore_weight.grad[pruned] == 0).all()
    assert (module.merge_weight.grad[~pruned] != 0).any()


@pytest.mark.parametrize('matrices', ['sparse', 'dense'])
def test_state_dict_round_trip(matrices: str) -> None:
    options = dict(
        matrices=matrices,
        num_groups=[12, 10, 8] if matrices == 'dense' else None,
        prune_rate=0.1,
    )
    module = compressor(**options)
    other = compressor(scores=False, **options)
    shapes = {k: v.shape for k, v in other.state_dict().items()}
    other.load_state_dict(module.state_dict())
    assert {k: v.shape for k, v in other.state_dict().items()} == shapes
    assert kept(other) == kept(module) and other.compressed
    x = torch.randn(2, 25, 4)
    assert torch.equal(run(other, x), run(module, x))
    assert kept(copy.deepcopy(module)) == kept(module)


def test_dense_form_starts_as_the_sparse_one() -> None:
    sparse = compressor(prune_rate=0.1)
    dense = compressor(
        scores=False,
        prune_rate=0.1,
        matrices='dense',
        num_groups=kept(sparse),
    )
    dense.set_scores(sparse.scores)
    x = torch.randn(2, 25, 4)
    torch.testing.assert_close(run(dense, x), run(sparse, x))
    x = torch.randn(2, 36, 4)
    torch.testing.assert_close(run(dense, x, (7, 5)), run(sparse, x, (7, 5)))


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(keep_rate=0), 'keep_rate=0 is not in'),
        (dict(keep_rate=0.9, prune_rate=0.2), 'is above 1'),
        (dict(layers=[3]), 'must name at least one of the layers 0..2'),
        (dict(layers=[]), 'must name at least one'),
        (dict(layers=[-1, 0]), 'must name at least one'),
        (dict(decay=0.5), 'decay=0.5 leaves layer 2'),
        (dict(decay=-0.1), 'decay=-0.1 leaves layer 2'),
        (dict(threshold='x'), "threshold='x' must be one of"),
        (dict(matrices='x'), "matrices='x' must be one of"),
        (dict(matrices='dense'), 'num_groups=None must hold 3 counts'),
        (dict(num_groups=[1, 2]), 'must hold 3 counts'),
        (dict(num_groups=[1, 2, 25]), 'must hold 3 counts'),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compressor(scores=False, **options)


def test_wrong_number_of_tokens() -> None:
    with pytest.raises(ValueError, match='got 24 tokens, expected 25'):
        run(compressor(), torch.randn(1, 24, 4))
