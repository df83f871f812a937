"""The mask transformer against the stock one, and on groups."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmseg.models.decode_heads import SegmenterMaskTransformerHead
from stock import assert_like_stock

from pm_seg.core import TokenGroups, match
from pm_seg.core.merging import Chain
from pm_seg.models import PMSegmenterMaskTransformerHead
from pm_seg.models.features import FeatureMaps

SMALL = dict(
    in_channels=24,
    channels=24,
    num_classes=5,
    num_layers=2,
    num_heads=3,
    embed_dims=24,
    dropout_ratio=0.0,
)


def build(**options):
    torch.manual_seed(0)
    head = PMSegmenterMaskTransformerHead(**{**SMALL, **options})
    head.init_weights()
    for parameter in head.parameters():
        if parameter.dim() > 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return head.eval()


def grouped(grid: tuple[int, int], merged: int, batch: int = 2):
    """Maps of a backbone that ended with fewer tokens, prefix of one."""
    tokens = grid[0] * grid[1]
    chain = Chain(torch.randn(batch, 1 + tokens, 24), num_prefix=1)
    for count in (merged // 2, merged - merged // 2):
        metric = torch.randn(batch, chain.tokens, 4)
        chain.merge(match(metric, count, 1), torch.ones(()))
    maps = torch.randn(batch, 24, *grid)
    return FeatureMaps([maps], chain.groups())


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(norm_cfg=dict(type='LN', eps=1e-6), drop_rate=0.1),
        dict(qkv_bias=False, num_fcs=3, mlp_ratio=2),
        dict(num_layers=1, act_cfg=dict(type='ReLU')),
    ],
)
def test_equals_stock(options: dict) -> None:
    assert_like_stock(
        SegmenterMaskTransformerHead,
        PMSegmenterMaskTransformerHead,
        {**SMALL, **options},
        [torch.randn(2, 24, 5, 7)],
    )


@torch.no_grad()
def test_layers_run_on_the_groups_of_the_backbone() -> None:
    """Full masks; class embeddings go in front and are in no group."""
    head, seen = build(), []
    for layer in head.layers:
        layer.ffn.register_forward_hook(
            lambda m, args, out: seen.append(out.shape[1])
        )
    inputs = grouped((4, 6), 10)
    masks = head(inputs)
    assert masks.shape == (2, 5, 4, 6)
    assert seen == [5 + 14] * 2
    for image in range(2):
        groups = inputs.groups
        one = TokenGroups(
            [
                SimpleNamespace(place=merge.place[[image]])
                for merge in groups.merges
            ],
            groups.size[[image]],
            1,
        )
        alone = head(FeatureMaps([inputs[0][[image]]], one))
        torch.testing.assert_close(alone, masks[[image]], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_token_keeps_what_told_it_apart() -> None:
    """Layers see means of groups; masks differ inside them all the same."""
    head, inputs = build(), grouped((4, 6), 12)
    place = inputs.groups.place
    masks = head(inputs).flatten(2)
    for image in range(2):
        for group in place[image].unique():
            members = masks[image][:, place[image] == group]
            if members.shape[1] > 1:
                assert members.diff(dim=1).abs().max() > 1e-4
    # What is alike in a group comes out as from the dense head.
    alike = inputs.groups.spread(inputs.groups.mean(inputs[0].flatten(2).mT))
    alike = alike.mT.reshape(inputs[0].shape)
    for layer in head.layers:  # attention counts every group once
        layer.attend = lambda x, log_size=None: x
    dense = head([alike])
    torch.testing.assert_close(
        head(FeatureMaps([alike], inputs.groups)), dense, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_without_groups_it_is_the_stock_head() -> None:
    """Behind a neck, a plain backbone, or where it is not to follow."""
    stock = SegmenterMaskTransformerHead(**SMALL).eval()
    head, ignoring = build(), build(follow_groups=False)
    inputs = grouped((5, 7), 12)
    for ours in (head, ignoring):
        stock.load_state_dict(ours.state_dict())
    expected = stock(inputs)
    plain = [list(inputs), tuple(inputs), FeatureMaps(inputs), inputs[:1]]
    for maps in plain:
        torch.testing.assert_close(head(maps), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ignoring(inputs), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(head(inputs), expected, atol=1e-3)


@pytest.mark.parametrize('grid', [(2, 1), (7, 3), (4, 6)])
def test_backward_through_the_groups(grid) -> None:
    head = build().train()
    inputs = grouped(grid, grid[0] * grid[1] // 2)
    inputs[0].requires_grad_()
    head(inputs).square().sum().backward()
    assert (inputs[0].grad.abs().sum(1) > 0).all()
    for name, parameter in head.named_parameters():
        if not name.startswith('conv_seg'):
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_loading_fails_loudly() -> None:
    head = build()
    state = head.state_dict()
    state['conv_seg.weight'] = torch.zeros(5, 24, 1, 1)
    del state['cls_emb']
    with pytest.raises(RuntimeError, match='cls_emb: missing') as error:
        head.load_state_dict(state, strict=False)
    assert 'conv_seg.weight: unexpected' in str(error.value)
    state = dict(build().state_dict(), **{'compressor.scores': torch.ones(2)})
    with pytest.raises(RuntimeError, match=r'by pm_seg 0\.1'):
        head.load_state_dict(state, strict=False)
