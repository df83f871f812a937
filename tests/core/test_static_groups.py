"""Scores, groups and budgets of the paper's compressor."""

from __future__ import annotations

import pytest
import torch
from toy import PAPER_SHAPE, kept
from toy import paper_compressor as compressor

from pm_seg.core import EncoderShape, LayerCost, StaticCompressor

GRID = PAPER_SHAPE.grid


def test_needs_a_structure() -> None:
    module = compressor(scores=False)
    assert module.needs_scores and not module.has_scores
    assert not module.has_structure and not module.compressed
    x, layers = torch.rand(1, 25, 4), [torch.sin] * 3
    for use in (
        lambda: module.token_maps(GRID),
        module.loads,
        lambda: module.run(layers, x, GRID),
    ):
        with pytest.raises(RuntimeError, match='there is no structure yet'):
            use()
    with module.disabled():
        out = module.run(layers, x, GRID).last
        torch.testing.assert_close(out, x.sin().sin().sin())
    with pytest.raises(ValueError, match='layer 0 are all zero'):
        module.build()


def test_structure_follows_new_scores_and_rates() -> None:
    module = compressor()
    shapes = {k: v.shape for k, v in module.state_dict().items()}
    before = module.group.clone()
    module.set_scores(torch.rand(3, 24))
    assert not torch.equal(module.group, before)
    module.keep_rate = 0.25
    module.build()
    assert kept(module) == [6, 6, 6]
    assert {k: v.shape for k, v in module.state_dict().items()} == shapes


def test_groups_of_ones_own_choice() -> None:
    module = compressor(scores=False)
    pairs = torch.arange(24).div(2, rounding_mode='floor').repeat(3, 1)
    module.set_groups(pairs)
    assert kept(module) == [12] * 3
    assert torch.equal(module.group, pairs)
    first = module.token_maps(GRID)[0]
    equal = torch.ones_like(first.merge_weight)
    torch.testing.assert_close(first.merge_weight, equal)


def test_a_layer_that_would_keep_nothing() -> None:
    module = compressor(scores=False, decay=0.4, threshold='global')
    with pytest.raises(ValueError, match='layer 2 would keep none'):
        module.set_scores(torch.rand(3, 24) * 0.01 + 1)


@pytest.mark.parametrize('threshold', ['layer', 'global'])
@pytest.mark.parametrize('keep', [0.5, 0.75, 1.0])
def test_keep_is_a_share_of_the_operations(threshold, keep: float) -> None:
    shape = EncoderShape(4, (8, 8), 1, 8, 8, LayerCost(256.0, 512.0, 16.0))
    module = compressor(shape=shape, threshold=threshold)
    module.set_keep(keep)
    assert keep - 0.03 < module.share <= keep
    assert module.keep == keep
    macs = sum(load.macs for load in module.loads())
    assert module.share == pytest.approx(macs / shape.dense_macs)
    rate = module.keep_rate
    module.build()
    assert module.keep_rate == rate, 'the budget stays'


def test_keep_without_scores_waits_for_them() -> None:
    module = compressor(scores=False)
    module.set_keep(0.7)
    assert not module.has_structure
    module.set_scores(torch.rand(3, 24) + 0.1)
    assert 0.6 < module.share <= 0.7


@pytest.mark.parametrize(
    ('options', 'keep', 'message'),
    [
        ({}, 0.0, r'keep=0.0 is not in \(0, 1\]'),
        ({}, 0.05, 'keep=0.05 is out of reach: of the operations'),
        (dict(layers=[1]), 0.6, 'compress more layers'),
        (dict(num_groups=[9, 9, 9]), 0.5, 'num_groups=.* fixes'),
    ],
)
def test_keep_out_of_reach(options: dict, keep: float, message: str) -> None:
    module = compressor(**options)
    before = kept(module)
    with pytest.raises(ValueError, match=message):
        module.set_keep(keep)
    assert module.keep is None and kept(module) == before
    module.build()


def test_a_damaged_checkpoint_is_refused() -> None:
    module = compressor()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    state['group'][1, 3] = 10**9
    with pytest.raises(ValueError, match='groups of layer 1'):
        module.load_state_dict(state)
    state = {k: v.clone() for k, v in compressor().state_dict().items()}
    with pytest.raises(ValueError, match='num_groups says 3'):
        compressor(num_groups=[3, 3, 3]).load_state_dict(state)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_small_scores_survive_half_precision(dtype: torch.dtype) -> None:
    """Scores around 1e-8 are 0 in float16, and all alike in bfloat16."""
    torch.manual_seed(0)
    scores = (torch.rand(3, 24) + 0.01) * 1e-8
    module, whole = compressor(scores=False), compressor(scores=False)
    for each in (module, whole):
        each.set_scores(scores)
    module.to(dtype)
    assert module.scores.dtype == torch.float32
    assert torch.equal(module.scores, scores)
    assert module.merge_weight.dtype == dtype
    x = torch.randn(2, 26, 4)
    for a, b in zip(module.token_maps((5, 5)), whole.token_maps((5, 5))):
        z = a.merge(x.to(dtype))
        assert z.dtype == dtype
        torch.testing.assert_close(z.float(), b.merge(x), rtol=0, atol=0.05)
    state = module.state_dict()
    fresh = compressor(scores=False).to(dtype)
    fresh.load_state_dict(state)
    fresh.build()
    assert torch.equal(fresh.group, module.group)


def test_weights_do_not_depend_on_the_scale_of_scores() -> None:
    torch.manual_seed(0)
    scores = torch.rand(3, 24) + 0.01
    small, large = compressor(scores=False), compressor(scores=False)
    small.set_scores(scores * 1e-9)
    large.set_scores(scores)
    assert torch.equal(small.group, large.group)
    torch.testing.assert_close(small.merge_weight, large.merge_weight)


def test_it_can_be_built_without_memory() -> None:
    with torch.device('meta'):
        module = StaticCompressor(PAPER_SHAPE)
    assert not module.has_structure
    module.to_empty(device='cpu')
    module.load_state_dict(compressor().state_dict())
    assert kept(module) == [12] * 3


def test_bad_scores_and_groups() -> None:
    module = compressor(scores=False)
    with pytest.raises(ValueError, match=r'expected \(3, 24\)'):
        module.set_scores(torch.rand(3, 25))
    with pytest.raises(ValueError, match='all zero'):
        module.set_scores(torch.zeros(3, 24))
    assert not module.has_structure
    with pytest.raises(ValueError, match='without gaps'):
        module.set_groups(torch.full((3, 24), 2))
    with pytest.raises(ValueError, match='group have shape'):
        module.set_groups(torch.zeros(3, 5, dtype=torch.long))
    fixed = compressor(scores=False, num_groups=[3, 3, 3])
    with pytest.raises(ValueError, match='num_groups says'):
        fixed.set_groups(torch.arange(24).repeat(3, 1))
