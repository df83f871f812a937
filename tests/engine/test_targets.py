"""Budgets."""

from __future__ import annotations

import pytest
import torch
from tiny import build

from pm_seg.engine import meet_target
from pm_seg.engine.targets import check_target
from pm_seg.utils import count_macs


def macs(model) -> int:
    images = torch.zeros(1, 3, 64, 64)
    return count_macs(lambda: model(images, mode='tensor'))


def paper():
    """With scores, as its structure needs them."""
    model = build(type='paper').eval()
    compressor = model.backbone.compressor
    compressor.store(torch.rand_like(compressor.scores) + 0.5)
    return model


@pytest.mark.parametrize('make', [build, paper])
@pytest.mark.parametrize('share', [0.75, 0.9, 1.0])
def test_share_of_the_dense_cost(share: float, make) -> None:
    """Of the whole model: embedding and decoder count too."""
    model = make().eval()
    compressor = model.backbone.compressor
    with compressor.disabled():
        dense = macs(model)
    keep = meet_target(model, dict(share=share))
    assert macs(model) <= share * dense
    assert compressor.share <= keep
    if keep < 0.85:
        compressor.set_keep(keep + 0.12)
        assert macs(model) > share * dense, 'the highest keep is chosen'


def test_gmacs_and_latency() -> None:
    model = build().eval()
    limit = 1.1 * macs(model) / 1e9
    meet_target(model, dict(gmacs=limit))
    assert 0.8 * limit < macs(model) / 1e9 <= limit
    assert meet_target(model, dict(latency_ms=10_000)) == 1.0


def test_impossible_target() -> None:
    with pytest.raises(ValueError, match='gmacs=1e-06 cannot be met'):
        meet_target(build(), dict(gmacs=1e-6))


@pytest.mark.parametrize(
    'target',
    [{}, dict(flops=1), dict(share=0.5, gmacs=1), dict(share=1.5),
     dict(gmacs=0)],
)  # fmt: skip
def test_bad_target(target: dict) -> None:
    with pytest.raises(ValueError, match='target'):
        check_target(target)
