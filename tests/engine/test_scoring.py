"""Scores of whole models."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from pm_seg.engine import apply_scores, describe, gather_scores
from pm_seg.engine.scoring import (
    compressible_modules,
    isolated_rng,
    require_compressible,
)


def build(compression=True, with_cp=False, head=True, **options):
    """A tiny segmentor; options are those of its compression."""
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor',
                mean=[127.5] * 3,
                std=[127.5] * 3,
                size=(64, 64),
                seg_pad_val=255,
            ),
            backbone=dict(
                type='PMVisionTransformer',
                img_size=64,
                embed_dims=24,
                num_layers=3,
                num_heads=3,
                drop_path_rate=0.5,
                drop_rate=0.2,
                compression=dict(keep=0.5, **options) if compression else None,
                with_cp=with_cp,
            ),
            decode_head=dict(
                type='PMSegmenterMaskTransformerHead',
                in_channels=24,
                channels=24,
                num_classes=5,
                num_layers=2,
                num_heads=3,
                embed_dims=24,
                dropout_ratio=0.3,
                loss_decode=dict(type='CrossEntropyLoss'),
                compression=dict(grid=(4, 4), keep=0.5, **options)
                if compression and head
                else None,
            ),
        )
    )
    model.init_weights()
    return model


def batch(first: int, count: int) -> dict:
    inputs, samples = [], []
    for i in range(first, first + count):
        generator = torch.Generator().manual_seed(i)
        inputs.append(
            torch.randint(0, 255, (3, 64, 64), generator=generator).byte()
        )
        label = torch.randint(0, 5, (1, 64, 64), generator=generator)
        label[label == 4] = 255
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label)))
    return dict(inputs=inputs, data_samples=samples)


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
    assert seen == [1, 2, 3, 4, 5]


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
    with pytest.raises(ValueError, match='got 25 tokens, expected 17'):
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
