"""Budgets."""

from __future__ import annotations

import pytest
import torch
from tiny import build

from pm_seg.engine import apply_scores, describe, meet_target
from pm_seg.engine.report import layer_macs
from pm_seg.engine.scoring import compressible_modules
from pm_seg.engine.targets import check_target
from pm_seg.utils import count_macs


def scored():
    model = build().eval()
    apply_scores(
        model,
        {
            name: torch.rand_like(module.compressor.scores) + 0.5
            for name, module in compressible_modules(model).items()
        },
    )
    return model


def macs(model) -> int:
    images = torch.zeros(1, 3, 64, 64)
    return count_macs(lambda: model(images, mode='tensor'))


@pytest.mark.parametrize('share', [0.6, 0.8, 1.0])
def test_share_of_the_dense_cost(share: float) -> None:
    model = scored()
    backbone, head = compressible_modules(model).values()
    with backbone.compressor.disabled(), head.compressor.disabled():
        dense = macs(model)
    keep = meet_target(model, dict(share=share))
    assert macs(model) <= share * dense
    assert backbone.compressor.keep == head.compressor.keep == keep
    for compressor in (backbone.compressor, head.compressor):
        compressor.keep = min(keep + 0.15, 1.0)
        compressor.build()
    if keep < 0.85:
        assert macs(model) > share * dense, 'the highest keep is chosen'


def test_gmacs_and_latency() -> None:
    model = scored()
    limit = 0.8 * macs(model) / 1e9
    meet_target(model, dict(gmacs=limit))
    assert macs(model) / 1e9 <= limit
    assert meet_target(model, dict(latency_ms=10_000)) == 1.0


def test_impossible_target() -> None:
    with pytest.raises(ValueError, match='cannot be met'):
        meet_target(scored(), dict(gmacs=1e-6))


@pytest.mark.parametrize(
    'target',
    [{}, dict(flops=1), dict(share=0.5, gmacs=1), dict(share=1.5),
     dict(gmacs=0)],
)  # fmt: skip
def test_bad_target(target: dict) -> None:
    with pytest.raises(ValueError, match='target'):
        check_target(target)


def test_report_agrees_with_the_counter() -> None:
    model = scored()
    backbone = model.backbone
    images = torch.zeros(1, 3, 64, 64)
    counted = count_macs(lambda: backbone(images))
    compressor = backbone.compressor
    expected = 16 * 3 * 16**2 * 24
    for layer, groups in zip(backbone.layers, compressor.num_groups):
        expected += layer_macs(layer, groups + 1)
        expected += compressor.map_macs(groups)
    assert counted == expected
    assert 'backbone: 16 patch tokens (4x4)' in describe(model)
