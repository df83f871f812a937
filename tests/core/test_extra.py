"""What layers take beside each patch token merges with the tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy import KINDS, Block, make, shape_of

from pm_seg.core import GroupRecorder


class Seeing:
    """A layer that keeps what it gets beside the tokens."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.mean_keys = block.mean_keys
        self.feed_forward = block.feed_forward

    def attend(self, x: Tensor, log_size: Tensor | None, seen: Tensor):
        self.seen = seen
        return self.block.attend(x, log_size)

    def __call__(self, x: Tensor, log_size: Tensor | None, seen: Tensor):
        self.seen = seen
        return self.block(x, log_size)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('per_layer', [False, True])
@torch.no_grad()
def test_layers_get_the_mean_of_each_group(kind: str, per_layer) -> None:
    blocks, compressor = make(KINDS[kind], shape_of(num_prefix=2))
    layers = [Seeing(block) for block in blocks]
    extra = torch.randn(4, 3, 24, 8) if per_layer else torch.randn(24, 8)
    x = torch.randn(2, 26, 24)
    with GroupRecorder(compressor) as recorder:
        compressor.run(layers, x, (4, 6), extra=extra)
    # Layers that merge in between attended to the groups before.
    groups = recorder.groups
    if getattr(getattr(compressor, 'schedule', None), 'between', False):
        groups = [torch.arange(24)[None], *groups[:-1]]
    merged = 0
    for index, (layer, group) in enumerate(zip(layers, groups)):
        own = extra[index] if per_layer else extra
        count = int(group.max()) + 1
        if count == 24 and layer.seen.dim() == own.dim():
            assert torch.equal(layer.seen, own)
            continue
        merged += 1
        member = (group[:, None] == torch.arange(count)[:, None]).float()
        mean = member / member.sum(2, keepdim=True)
        expected = mean[:, None] @ own
        seen = layer.seen.expand_as(expected)
        torch.testing.assert_close(seen, expected)
    assert merged
    with compressor.disabled():
        compressor.run(layers, x, (4, 6), extra=extra)
    for index, layer in enumerate(layers):
        own = extra[index] if per_layer else extra
        assert torch.equal(layer.seen, own)


def test_it_is_counted() -> None:
    from dataclasses import replace

    for kind in KINDS.values():
        _, without = make(kind)
        _, beside = make(kind, replace(shape_of(), extra_dims=16))
        if kind.get('type') == 'paper':
            assert beside.share > without.share
        else:
            assert sum(beside.tokens((4, 6))) <= sum(without.tokens((4, 6)))
