"""Scores of whole models."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny import batch, build

from pm_seg.engine import apply_scores, describe, gather_scores
from pm_seg.engine.scoring import (
    compressible_modules,
    isolated_rng,
    require_compressible,
)


def test_scores_do_not_depend_on_the_batch_split() -> None:
    model = build()
    whole = gather_scores(model, [batch(0, 8)], 1)
    split = gather_scores(model, [batch(2 * i, 2) for i in range(4)], 4)
    assert set(whole) == {'backbone', 'decode_head'}
    for name, scores in whole.items():
        assert scores.shape == (3 if name == 'backbone' else 2, 16)
        torch.testing.assert_close(split[name], scores, rtol=1e-5, atol=0)


def test_scoring_changes_nothing() -> None:
    model = build().train()
    model.backbone.layers[0].requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    gather_scores(model, [batch(0, 2)], 3)
    assert model.training and model.backbone.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_activation_checkpointing_scores_the_same() -> None:
    plain, saving = build(), build(with_cp=True)
    a = gather_scores(plain, [batch(0, 2)], 1)
    b = gather_scores(saving, [batch(0, 2)], 1)
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-5, atol=0)


def test_batches_start_again_and_progress_is_reported() -> None:
    seen: list[int] = []
    gather_scores(build(), [batch(0, 1), batch(1, 1)], 5, progress=seen.append)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_structure_from_scores() -> None:
    model = build()
    apply_scores(model, gather_scores(model, [batch(0, 4)], 1))
    for module in compressible_modules(model).values():
        assert module.compressor.has_structure
    text = describe(model)
    assert 'backbone: 16 patch tokens (4x4)' in text
    assert 'decode_head: 16 patch tokens' in text


def test_nothing_to_compress() -> None:
    with pytest.raises(ValueError, match="type='PMVisionTransformer'"):
        require_compressible(build(compression=False))


def test_images_of_another_size() -> None:
    model = build()
    model.data_preprocessor.size = (96, 64)
    with pytest.raises(ValueError, match='got 24 patch tokens, expected 16'):
        gather_scores(model, [batch(0, 1)], 1)


def test_isolated_rng() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    with isolated_rng(1):
        first = (torch.rand(1).item(), np.random.rand(), random.random())
    after = (torch.rand(1).item(), np.random.rand(), random.random())
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert after == (torch.rand(1).item(), np.random.rand(), random.random())
    with isolated_rng(1):
        again = (torch.rand(1).item(), np.random.rand(), random.random())
    assert again == first
