"""What tools add to the config of a run."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config

from pm_seg.cli.runs import guard_run, use_amp


@pytest.mark.parametrize(
    ('capability', 'given', 'expected'),
    [
        ((9, 0), {}, ('bfloat16', 1.0)),
        ((7, 5), {}, (None, 'dynamic')),
        (None, {}, (None, 'dynamic')),  # an accelerator that is no GPU
        ((9, 0), dict(dtype='float16'), ('float16', 'dynamic')),
        ((9, 0), dict(loss_scale=512.0), ('bfloat16', 512.0)),
    ],
)
def test_mixed_precision_is_bfloat16_where_there_is_some(
    monkeypatch, capability, given: dict, expected: tuple
) -> None:
    cuda = capability is not None
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, 'get_device_capability', lambda: capability
    )
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper', **given)))
    use_amp(cfg)
    wrapper = cfg.optim_wrapper
    assert wrapper.type == 'AmpOptimWrapper'
    assert (wrapper.get('dtype'), wrapper.loss_scale) == expected


@pytest.mark.parametrize('cuda', [False, True])
def test_batches_are_pinned_for_a_gpu(monkeypatch, cuda: bool) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    cfg = Config(
        dict(
            train_dataloader=dict(batch_size=1),
            val_dataloader=dict(pin_memory=False),
            test_dataloader=None,
        )
    )
    guard_run(cfg)
    assert cfg.train_dataloader.get('pin_memory', False) == cuda
    assert not cfg.val_dataloader.pin_memory
