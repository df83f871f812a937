"""The mask transformer against the stock one, and compressed."""

from __future__ import annotations

import pytest
import torch
from mmseg.models.decode_heads import SegmenterMaskTransformerHead

from pm_seg.models import PMSegmenterMaskTransformerHead

SMALL = dict(
    in_channels=24,
    channels=24,
    num_classes=5,
    num_layers=2,
    num_heads=3,
    embed_dims=24,
    dropout_ratio=0.0,
)


def build(compression: dict | None = None, **options):
    torch.manual_seed(0)
    head = PMSegmenterMaskTransformerHead(
        **{**SMALL, 'compression': compression, **options}
    )
    head.init_weights()
    if compression is not None:
        compressor = head.compressor
        compressor.set_scores(torch.rand_like(compressor.scores) + 0.01)
    return head.eval()


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(norm_cfg=dict(type='LN', eps=1e-6), drop_rate=0.1),
        dict(qkv_bias=False, num_fcs=3, mlp_ratio=2),
        dict(num_layers=1, act_cfg=dict(type='ReLU')),
    ],
)
def test_equals_stock_without_compression(options: dict) -> None:
    stock = SegmenterMaskTransformerHead(**{**SMALL, **options}).eval()
    stock.init_weights()
    ours = build(**options)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    inputs = [torch.randn(2, 24, 5, 7)]
    with torch.no_grad():
        torch.testing.assert_close(
            ours(inputs), stock(inputs), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize('grid', [(4, 6), (6, 4), (7, 3), (1, 1)])
def test_full_masks_when_compressed(grid) -> None:
    head = build(dict(grid=(4, 6), keep=0.5, budget='layer'))
    seen = []
    for layer in head.layers:
        layer.ffn.register_forward_hook(
            lambda m, args, out: seen.append(out.shape[1])
        )
    masks = head([torch.randn(2, 24, *grid)])
    assert masks.shape == (2, 5, *grid)
    assert all(n < 5 + grid[0] * grid[1] or grid == (1, 1) for n in seen)
    masks.square().sum().backward()
    if grid != (1, 1):
        assert head.compressor.restore_weight.grad.abs().sum() > 0


def test_class_embeddings_are_prefix_tokens() -> None:
    head = build(dict(grid=(4, 6), keep=0.5))
    assert head.compressor.num_prefix == 5
    for token_map in head.compressor.token_maps((4, 6)):
        slot = token_map.segments.slot
        assert slot[:5].tolist() == [0, 1, 2, 3, 4]
        assert (token_map.merge_weight[:5] == 1).all()


def test_identity_structure_is_the_dense_head() -> None:
    dense = build()
    compressed = build(dict(grid=(4, 6), keep=1.0))
    compressed.load_state_dict(dense.state_dict())
    inputs = [torch.randn(2, 24, 4, 6)]
    with torch.no_grad():
        assert torch.equal(compressed(inputs), dense(inputs))


def test_loading_fails_loudly() -> None:
    head = build()
    state = head.state_dict()
    state['conv_seg.weight'] = torch.zeros(5, 24, 1, 1)
    del state['cls_emb']
    with pytest.raises(RuntimeError, match='cls_emb: missing') as error:
        head.load_state_dict(state, strict=False)
    assert 'conv_seg.weight: unexpected' in str(error.value)


def test_grid_is_required() -> None:
    with pytest.raises(ValueError, match=r'needs grid=\(rows, columns\)'):
        PMSegmenterMaskTransformerHead(**SMALL, compression=dict(keep=0.5))
