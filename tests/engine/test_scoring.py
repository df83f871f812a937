"""Scores of whole models."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny import batch, build

from pm_seg.engine import describe, gather_scores
from pm_seg.engine.calibration import fit_importance
from pm_seg.engine.scoring import isolated_rng, require_compressible


def measure(model, batches: list[dict], passes: int = 1) -> torch.Tensor:
    """Scores where the structure needs them, else directions; (L, ...)."""
    compressor = model.backbone.compressor
    if compressor.needs_scores:
        scores = gather_scores(model, batches, passes * len(batches))
        assert set(scores) == {'backbone'}
        return scores['backbone']
    fit_importance(model, batches * passes)
    assert compressor.calibrated
    return compressor.comparison.importance.clone()


KINDS = pytest.mark.parametrize('kind', ['pm', 'paper'])


@KINDS
def test_it_does_not_matter_how_batches_are_split(kind: str) -> None:
    model = build(type=kind)
    whole = measure(model, [batch(0, 8)])
    split = measure(model, [batch(2 * i, 2) for i in range(4)])
    assert whole.shape == (3, 24 if kind == 'pm' else 16)
    scale = whole.abs().max()
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-4 * scale)


@KINDS
def test_measuring_changes_nothing_else(kind: str) -> None:
    model = build(type=kind).train()
    model.backbone.layers[0].requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    measure(model, [batch(0, 2)], 3)
    assert model.training and model.backbone.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        name = key.rpartition('compressor.')[2].removeprefix('comparison.')
        found = 'importance', 'components', 'by_components', 'shares'
        if name not in found:
            assert torch.equal(value, before[key]), key


@KINDS
def test_activation_checkpointing_measures_the_same(kind: str) -> None:
    plain, saving = build(type=kind), build(type=kind, with_cp=True)
    a, b = (measure(model, [batch(0, 2)]) for model in (plain, saving))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_batches_start_again_and_progress_is_reported() -> None:
    seen = []
    model = build(type='paper')
    batches = [batch(0, 1), batch(1, 1)]
    gather_scores(model, batches, 5, progress=lambda *s: seen.append(s))
    assert seen == [(i, 5) for i in range(6)]


def test_structure_from_scores() -> None:
    model = build(type='paper')
    compressor = model.backbone.compressor
    compressor.store(gather_scores(model, [batch(0, 4)], 1)['backbone'])
    compressor.build()
    assert compressor.has_structure
    assert 'backbone: 16 patch tokens (4x4)' in describe(model)


def test_nothing_to_compress() -> None:
    with pytest.raises(ValueError, match="type='PMVisionTransformer'"):
        require_compressible(build(compression=False))


def test_positions_need_images_of_one_size_and_contents_do_not() -> None:
    model = build(type='paper')
    model.data_preprocessor.size = (96, 64)
    with pytest.raises(ValueError, match='got 24 patch tokens, expected 16'):
        gather_scores(model, [batch(0, 1)], 1)
    model = build()
    model.data_preprocessor.size = (96, 64)
    assert measure(model, [batch(0, 1)]).isfinite().all()


def test_isolated_rng() -> None:
    def draw() -> tuple[float, ...]:
        return torch.rand(1).item(), np.random.rand(), random.random()

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)

    seed()
    with isolated_rng(1):
        first = draw()
    after = draw()
    seed()
    assert after == draw()
    with isolated_rng(1):
        assert draw() == first
