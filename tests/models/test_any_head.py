"""Stock heads on compressed backbones: full maps at every level and size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

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
        compression=dict(grid=(4, 4), keep=0.5),
    ),
}
KINDS = (
    dict(keep=0.5),
    dict(keep=0.4, prune=0.2, builder='row_window', restore='replace'),
    dict(keep=0.5, span=2),
    dict(keep=0.5, builder='matching'),
    dict(type='tome', keep=0.6),
    dict(type='algm', keep=0.6),
)


def set_scores(module) -> None:
    compressor = getattr(module, 'compressor', None)
    if compressor is None:
        return
    if compressor.uses_scores:
        compressor.set_scores(torch.rand_like(compressor.scores) + 0.01)
    else:
        compressor.build()


@pytest.fixture(scope='module')
def backbones() -> list[PMVisionTransformer]:
    torch.manual_seed(0)
    models = []
    for kind in KINDS:
        models.append(
            PMVisionTransformer(
                img_size=64,
                embed_dims=24,
                num_layers=3,
                num_heads=3,
                out_indices=(0, 1, 2),
                compression=dict(kind),
            ).eval()
        )
        set_scores(models[-1])
    return models


@pytest.fixture(scope='module')
def heads() -> dict:
    init_default_scope('mmseg')
    torch.manual_seed(0)
    built = {}
    for name, options in HEADS.items():
        built[name] = MODELS.build(
            dict(type=name, channels=24, num_classes=5, **options)
        ).eval()
        set_scores(built[name])
    return built


@given(
    st.tuples(st.integers(17, 150), st.integers(17, 150)),
    st.integers(0, len(KINDS) - 1),
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
