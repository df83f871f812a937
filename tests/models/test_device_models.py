"""Whole models on accelerators that are not there."""

from __future__ import annotations

import pytest
import tiny
import torch
from devices import SimulatedDevice, fake_cuda, move

from pm_seg.models import layers
from pm_seg.utils import count_macs

KINDS = {
    'pm': {},
    'tome': dict(type='tome', keep=0.6),
    'algm': dict(type='algm', keep=0.7),
    'paper': dict(type='paper'),
}


def build(kind: str):
    model = tiny.build(**KINDS[kind]).eval()
    compressor = model.backbone.compressor
    if compressor.needs_scores:
        torch.manual_seed(0)
        compressor.set_scores(torch.rand_like(compressor.scores) + 0.5)
    return model


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize('kind', ['pm', 'tome', 'algm'])
@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_segmentors_without_numbers(
    kind: str, dtype, autocast, monkeypatch
) -> None:
    """Attention counts sizes without a mask, which fast kernels refuse."""
    masks, attend = [], layers.F.scaled_dot_product_attention

    def watch(*args, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(*args, **kwargs)

    monkeypatch.setattr(layers.F, 'scaled_dot_product_attention', watch)
    model = build(kind)
    with fake_cuda(autocast=autocast):
        move(model, 'cuda', dtype)
        images = torch.empty(2, 3, 64, 64, device='cuda', dtype=dtype)
        out = model(images, mode='tensor')
        assert out.device.type == 'cuda' and out.shape[:2] == (2, 5)
        assert out.dtype in (dtype, autocast, torch.float32)
    assert masks and all(mask is None for mask in masks)


@torch.no_grad()
def test_segmentors_never_wait(kind: str) -> None:
    """Masks and operations are those of the CPU."""
    model, images = build(kind), torch.randn(2, 3, 64, 64)
    expected = model(images, mode='tensor')
    macs = count_macs(lambda: model(images, mode='tensor'))
    with SimulatedDevice() as device:
        move(model, device.device)
        images = images.to(device.device)
        model(images, mode='tensor')  # sizes of images, once
        device.waits.clear()
        found = model(images, mode='tensor')
        assert not device.waits
        again = count_macs(lambda: model(images, mode='tensor'))
        torch.testing.assert_close(found.cpu(), expected)
    assert 1 <= again / macs < 1.1, 'two channels of attention for a mask'
