"""From a dense model to a compressed one."""

from __future__ import annotations

import pytest
import torch
from helpers import in_one_graph
from tiny import batch, build

from pm_seg.engine import Measuring, compress, describe
from pm_seg.engine.calibration import SEARCH
from pm_seg.engine.compression import needs_data
from pm_seg.utils import count_macs

BATCHES = [batch(0, 2), batch(2, 2)]
FEW = Measuring(score_batches=2, calib_batches=2)


def macs(module) -> int:
    images = torch.zeros(1, 3, 64, 64)
    return count_macs(lambda: module(images))


def recording(seen: list) -> dict:
    return dict(progress=lambda *steps: seen.append(steps), measuring=FEW)


def test_without_data_it_is_done_at_once() -> None:
    model, seen = build().train(), []
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert not needs_data(model)
    random = torch.get_rng_state()
    compress(model, None, **recording(seen))
    assert seen == [] and model.training
    assert torch.equal(torch.get_rng_state(), random)
    changed = {
        key
        for key, value in model.state_dict().items()
        if not torch.equal(value, state[key])
    }
    assert changed == {'backbone.compressor.settled'}
    assert model.backbone.compressor.compressed


def test_data_says_how_to_merge() -> None:
    model, seen = build(), []
    random = torch.get_rng_state()
    compress(model, BATCHES, **recording(seen))
    assert torch.equal(torch.get_rng_state(), random)
    compressor = model.backbone.compressor
    assert compressor.calibrated and compressor.compressed
    settings = sum(map(len, SEARCH.values())) - len(SEARCH) + 1
    assert seen == [
        *(('Importance of tokens', i, 2) for i in range(3)),
        *(('Ways to merge', i, settings) for i in range(settings + 1)),
    ]
    assert compressor.share <= compressor.keep == 0.5
    again = build()
    compress(again, BATCHES, measuring=FEW)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, msg=key)
    # What is important is known; how to merge depends on the budget.
    seen.clear()
    compress(model, BATCHES, **recording(seen))
    assert seen == []
    directions = compressor.comparison.importance.clone()
    compress(model, BATCHES, keep=0.8, **recording(seen))
    assert {title for title, *_ in seen} == {'Ways to merge'}
    assert torch.equal(compressor.comparison.importance, directions)
    assert 0.7 < compressor.share <= 0.8
    # No batch, no measurement.
    fresh = build()
    compress(fresh, BATCHES, measuring=Measuring(calib_batches=0))
    assert not fresh.backbone.compressor.calibrated
    assert fresh.backbone.compressor.compressed


def test_nothing_is_measured_for_peers() -> None:
    model, seen = build(type='tome', keep=0.7), []
    compress(model, BATCHES, keep=0.8, **recording(seen))
    assert seen == [] and model.backbone.compressor.share <= 0.8


def test_the_paper_measures_scores() -> None:
    model, seen = build(type='paper'), []
    assert needs_data(model)
    with pytest.raises(ValueError, match="scores need images.*type='pm'"):
        compress(model, None)
    compress(model, BATCHES, **recording(seen))
    assert seen == [('Scoring batches', i, 2) for i in range(3)]
    compressor = model.backbone.compressor
    assert compressor.has_structure and not needs_data(model)
    # Another budget needs no data any more.
    compress(model, None, keep=0.6)
    assert 0.5 < compressor.share <= 0.6


@pytest.mark.parametrize('kind', ['tome', 'algm'])
def test_peers_need_and_use_no_data(kind: str) -> None:
    model, seen = build(type=kind, keep=0.8).eval(), []
    assert not needs_data(model)
    compress(model, BATCHES, **recording(seen))
    assert seen == []
    assert model.backbone(torch.rand(2, 3, 64, 64))[0].shape == (2, 24, 4, 4)
    compressor = model.backbone.compressor
    with compressor.disabled():
        dense = macs(model.backbone)
    saved = (1 - compressor.share) * compressor.shape.dense_macs
    assert dense - macs(model.backbone) == pytest.approx(saved, rel=0.02)
    assert 0.6 < compressor.share <= 0.8


@pytest.mark.parametrize('loader', [None, BATCHES])
def test_a_target_of_the_whole_model(loader) -> None:
    model = build().eval()
    with model.backbone.compressor.disabled():
        dense = macs(model)
    compress(model, loader, target=dict(share=0.75), measuring=FEW)
    assert 0.65 * dense < macs(model) <= 0.75 * dense


def test_wrong_uses() -> None:
    with pytest.raises(ValueError, match='keep=0.5 and target=.* exclude'):
        compress(build(), keep=0.5, target=dict(share=0.5))
    with pytest.raises(ValueError, match='yields no batch'):
        compress(build(), [])
    with pytest.raises(ValueError, match='keep=0.01 is out of reach'):
        compress(build(), keep=0.01)
    with pytest.raises(ValueError, match='nothing to compress'):
        compress(build(compression=False))
    with pytest.raises(ValueError, match='score_batches=0 must be at least 1'):
        Measuring(score_batches=0)
    with pytest.raises(ValueError, match='calib_batches=-1 at least 0'):
        Measuring(calib_batches=-1)


@pytest.mark.parametrize(
    'options', [{}, dict(type='paper'), dict(type='algm', keep=0.8)]
)
def test_the_report(options: dict) -> None:
    model = build(**options)
    compress(model, BATCHES, measuring=FEW)
    text = describe(model)
    assert 'backbone: 16 patch tokens (4x4)' in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    share = model.backbone.compressor.share
    assert f'{share:.1%}' in lines[-1]
    assert ('attention' in text) == (options.get('type') == 'algm')


@in_one_graph
def test_the_whole_model_compiles() -> None:
    """Encoder, and a decoder on its groups: one graph, in mixed precision."""
    torch._dynamo.reset()
    model = build().eval()
    images = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(
        lambda x: model(x, mode='tensor'), fullgraph=True, backend='aot_eager'
    )
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected = model(images, mode='tensor')
        found = compiled(images)
    error = (found - expected).float().abs()
    assert error.mean() < 0.02 * expected.float().abs().mean()
