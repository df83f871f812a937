"""Stock heads on compressed backbones: full maps at every level and size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from toy import KINDS
from vits import build

from pm_seg.models import PMVisionTransformer

LEVELS = dict(in_channels=[24] * 3, in_index=[0, 1, 2])
LAST = dict(in_channels=24, in_index=2)
HEADS = {
    'FCNHead': dict(LAST, num_convs=1),
    'PSPHead': LAST,
    'ASPPHead': dict(LAST, dilations=(1, 2)),
    'UPerHead': dict(LEVELS, pool_scales=(1, 2)),
    'SegformerHead': LEVELS,
    'SegmenterMaskTransformerHead': dict(
        LAST, num_layers=1, num_heads=3, embed_dims=24
    ),
    'PMSegmenterMaskTransformerHead': dict(
        LAST,
        num_layers=1,
        num_heads=3,
        embed_dims=24,
    ),
}


@pytest.fixture(scope='module')
def backbones() -> list[PMVisionTransformer]:
    options = dict(img_size=64, out_indices=(0, 1, 2))
    return [build(kind, **options) for kind in KINDS.values()]


@pytest.fixture(scope='module')
def heads() -> dict:
    init_default_scope('mmseg')
    torch.manual_seed(0)
    built = {}
    for name, options in HEADS.items():
        built[name] = MODELS.build(
            dict(type=name, channels=24, num_classes=5, **options)
        ).eval()
    return built


NECKS = {
    'MultiLevelNeck': dict(scales=[2, 1, 0.5]),
    'MLANeck': dict(norm_layer=dict(type='LN')),
}


@given(
    st.tuples(st.integers(17, 150), st.integers(17, 150)),
    st.sampled_from(range(len(KINDS))),
    st.integers(1, 2),
)
@settings(max_examples=20)
def test_every_head_on_every_size(backbones, heads, size, kind, batch) -> None:
    """Backward as well: no level is cut off from the compressed blocks."""
    grid = tuple(-(-n // 16) for n in size)
    levels = backbones[kind](torch.randn(batch, 3, *size))
    assert [tuple(t.shape) for t in levels] == [(batch, 24, *grid)] * 3
    for name, head in heads.items():
        logits = head(levels)
        assert logits.shape == (batch, 5, *grid), name
        assert torch.isfinite(logits).all(), name
    gradient = torch.autograd.grad(
        sum(level.square().sum() for level in levels),
        backbones[kind].patch_embed.projection.weight,
    )[0]
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize('size', [(64, 64), (97, 150)])
@torch.no_grad()
def test_necks_take_the_maps_and_leave_the_groups(
    backbones, heads, size
) -> None:
    """What is behind one works on all tokens."""
    levels = backbones[0](torch.randn(2, 3, *size))
    assert levels.groups is not None
    plain = tuple(levels)
    for name, options in NECKS.items():
        cfg = dict(type=name, in_channels=[24] * 3, out_channels=24)
        neck = MODELS.build({**cfg, **options}).eval()
        outs = neck(levels)
        assert not hasattr(outs, 'groups')
        for a, b in zip(outs, neck(plain)):
            assert torch.equal(a, b), name
    head = heads['PMSegmenterMaskTransformerHead']
    stock = heads['SegmenterMaskTransformerHead']
    stock.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(plain), stock(levels), rtol=0, atol=1e-4)
    assert not torch.allclose(head(levels), stock(levels), atol=1e-3)
