"""timm's models as backbones of mmseg and mmpretrain."""

from __future__ import annotations

import copy
from pathlib import Path

import architectures
import pytest
import torch
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS as PRETRAIN_MODELS
from mmseg.registry import MODELS
from torch import nn

import pm_seg
from pm_seg.engine.optimizers import PMLayerDecayOptimWrapperConstructor
from pm_seg.models import PMTimmVisionTransformer

pytestmark = pytest.mark.filterwarnings('ignore')
HALF = dict(keep=0.5, first=1)


def build(
    kind: str = 'dinov3', compression: dict | None = None, **options
) -> PMTimmVisionTransformer:
    torch.manual_seed(0)
    arguments = {**architectures.SMALL, **architectures.KINDS[kind]}
    arguments.pop('num_classes')
    name = arguments.pop('model_name')
    model = PMTimmVisionTransformer(
        name,
        **{'img_size': 112, 'model_args': arguments, **options},
        compression=compression,
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data += 0.15 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize('kind', architectures.KINDS)
@torch.no_grad()
def test_maps_of_any_size(kind: str) -> None:
    if kind == 'hybrid':
        pytest.skip('timm pads no images for it')
    options = dict(out_indices=(0, -1))
    dense, small = build(kind, **options), build(kind, HALF, **options)
    small.load_state_dict(dense.state_dict())
    patch = dense.patch_size[0]
    for size in ((112, 112), (97, 150)):
        x = torch.randn(2, 3, *size)
        grid = tuple(-(-n // patch) for n in size)
        expected, got = dense(x), small(x)
        assert got.groups is not None and expected.groups is None
        for a, b in zip(got, expected):
            assert a.shape == b.shape == (2, 48, *grid)
        assert torch.equal(got[0], expected[0]), 'dense so far'
        assert not torch.equal(got[1], expected[1])
        with small.compressor.disabled():
            for a, b in zip(small(x), expected):
                torch.testing.assert_close(a, b)
    vit = dense.timm_model
    found = vit.forward_intermediates(
        x, [2], norm=True, intermediates_only=True
    )
    torch.testing.assert_close(expected[1], found[0])


HEADS = {
    'FCNHead': dict(num_convs=0, concat_input=False, channels=48),
    'PMSegmenterMaskTransformerHead': dict(
        num_layers=1, num_heads=3, embed_dims=48, channels=48
    ),
    'UPerHead': dict(
        in_channels=[24] * 4,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2),
        channels=16,
        neck=dict(
            type='MultiLevelNeck',
            in_channels=[48] * 4,
            out_channels=24,
            scales=[4, 2, 1, 0.5],
        ),
    ),
    'SETRUPHead': dict(channels=16, num_convs=1, norm_cfg=dict(type='BN')),
    'DPTHead': dict(
        in_channels=(48,) * 4,
        in_index=[0, 1, 2, 3],
        embed_dims=48,
        channels=16,
        input_transform='multiple_select',
        post_process_channels=[8, 8, 16, 16],
        readout_type='project',
        out_type='featmap_cls',
    ),
}


@pytest.mark.parametrize('kind', ['dinov3', 'dinov2 registers', 'siglip'])
@pytest.mark.parametrize('name', HEADS)
def test_heads(name: str, kind: str) -> None:
    """Forward and backward, of any size, behind four levels or one."""
    options = dict(HEADS[name])
    neck, out_type = options.pop('neck', None), options.pop('out_type', None)
    if out_type and kind == 'siglip':
        pytest.skip('no class token')
    init_default_scope('mmseg')
    several = 'in_index' in options
    arguments = {**architectures.SMALL, **architectures.KINDS[kind]}
    arguments.pop('num_classes')
    model = MODELS.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(
                type='PMTimmVisionTransformer',
                model_name=arguments.pop('model_name'),
                img_size=112,
                out_indices=(0, 1, 2, 3) if several else -1,
                out_type=out_type or 'featmap',
                model_args={**arguments, 'depth': 4},
                compression=HALF,
            ),
            neck=neck,
            decode_head=dict(
                type=name,
                num_classes=5,
                **{'in_channels': 48, 'in_index': 0, **options},
            ),
        )
    )
    model.train()
    out = model(torch.randn(2, 3, 98, 130))
    assert out.shape[:2] == (2, 5)
    out.square().sum().backward()
    weight = model.backbone.timm_model.patch_embed.proj.weight
    assert weight.grad.isfinite().all() and weight.grad.any()


def test_pooled_outputs_for_classifiers() -> None:
    init_default_scope('mmpretrain')
    for kind in ('siglip', 'clip', 'dinov3', 'eva02 fused'):
        backbone = build(kind, HALF, out_type='pooled')
        x = torch.randn(2, 3, 112, 112)
        with torch.no_grad(), backbone.compressor.disabled():
            expected = backbone.timm_model(x)
            torch.testing.assert_close(backbone(x)[0], expected)
        assert backbone.compressor.schedule.compare == 'keys'
        assert backbone(x)[0].shape == (2, 48)
    assert build('clip', HALF, out_type='pooled').reads_prefix
    assert PRETRAIN_MODELS.get('PMTimmVisionTransformer') is type(backbone)


def test_weights_of_timm(tmp_path: Path) -> None:
    """A file with timm's names; another image size is resampled."""
    source = architectures.build('dinov2', num_classes=0)
    path = tmp_path / 'dinov2.pth'
    torch.save(source.state_dict(), path)
    backbone = build('dinov2', HALF, img_size=140, pretrained=str(path))
    assert not torch.equal(backbone.timm_model.norm.weight, source.norm.weight)
    backbone.init_weights()
    assert torch.equal(backbone.timm_model.norm.weight, source.norm.weight)
    assert backbone.timm_model.pos_embed.shape == (1, 101, 48)
    same = build('dinov2', img_size=112, pretrained=str(path))
    same.init_weights()
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        expected = source.forward_intermediates(
            x, [2], norm=True, intermediates_only=True
        )[0]
        torch.testing.assert_close(same(x)[0], expected)


def test_checkpoints_fit_or_say_so() -> None:
    """mmseg's own wrapper's too; of another image size; not of another."""
    dense, small = build(), build(compression=HALF)
    small.load_state_dict(dense.state_dict())
    state = small.state_dict()
    wrapper = MODELS.build(
        dict(
            type='TIMMBackbone',
            model_name='vit_small_patch16_dinov3',
            features_only=False,
            pretrained=False,
            **architectures.SMALL,
        )
    )
    dense.load_state_dict(
        {
            key: value
            for key, value in wrapper.state_dict().items()
            if '.head.' not in key
        }
    )
    with pytest.raises(RuntimeError, match='the model is dense'):
        dense.load_state_dict(state)
    lacking = copy.copy(state)
    lacking.pop('timm_model.blocks.0.norm1.weight')
    with pytest.raises(RuntimeError, match='norm1.weight: missing'):
        small.load_state_dict(lacking)
    smaller = build('dinov2', HALF, img_size=56)
    larger = build('dinov2', HALF, img_size=112)
    larger.load_state_dict(smaller.state_dict())


def test_frozen_stages_and_learning_rates() -> None:
    backbone = build(compression=HALF, frozen_stages=2, with_cp=True).train()
    vit = backbone.timm_model
    assert not vit.patch_embed.training and not vit.blocks[1].training
    assert vit.blocks[2].training
    trained = {n for n, p in backbone.named_parameters() if p.requires_grad}
    assert trained and all(
        name.startswith(('timm_model.blocks.2', 'timm_model.norm', 'comp'))
        for name in trained
    )
    backbone(torch.randn(1, 3, 112, 112))[0].sum().backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == (name in trained), name
    whole = build(frozen_stages=3)
    assert not [p for p in whole.parameters() if p.requires_grad]

    model = nn.Module()
    model.backbone = build('rope mixed ape')
    wrapper = PMLayerDecayOptimWrapperConstructor(
        dict(optimizer=dict(type='SGD', lr=1.0)), dict(decay_rate=0.5)
    )(model)
    rates = {
        id(p): group['lr']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    vit = model.backbone.timm_model
    assert rates[id(vit.pos_embed)] == 0.5**4
    assert rates[id(vit.blocks[2].norm1.weight)] == 0.5
    assert rates[id(vit.norm.weight)] == 1.0


def test_a_built_segmentor_is_compressed() -> None:
    init_default_scope('mmseg')
    model = MODELS.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(
                type='PMTimmVisionTransformer',
                model_name='vit_small_patch16_dinov3',
                img_size=64,
                model_args=dict(embed_dim=48, depth=3, num_heads=3),
            ),
            decode_head=dict(
                type='FCNHead',
                in_channels=48,
                channels=48,
                num_convs=0,
                concat_input=False,
                num_classes=5,
                in_index=0,
            ),
        )
    ).eval()
    batches = [(torch.randn(2, 3, 64, 64), torch.randint(5, (2, 64, 64)))]
    small = pm_seg.compress_model(model, batches, keep=0.6, progress=False)
    assert small.backbone.compressor.calibrated
    assert model.backbone.compressor is None
    assert small(batches[0][0]).shape == (2, 5, 4, 4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(model_name='vit_small_dinov3'), 'no model of timm .* are near'),
        (dict(model_name='resnet18'), 'timm builds no resnet18 that takes'),
        (
            dict(model_name='swin_tiny_patch4_window7_224'),
            'swin_tiny|SwinTransformer',
        ),
        (dict(out_type='cls'), "out_type='cls' must be one of"),
        (dict(out_indices=12), r'out_indices=12 must lie in -12..11'),
        (
            dict(
                model_name='vit_base_patch16_siglip_224',
                out_type='featmap_cls',
                model_args=dict(depth=1),
            ),
            'has no class token',
        ),
    ],
)
def test_misuse_is_one_sentence(options: dict, message: str) -> None:
    options = {'model_name': 'vit_tiny_patch16_dinov3_qkvb', **options}
    with pytest.raises(ValueError, match=message) as caught:
        PMTimmVisionTransformer(**options)
    assert '\n' not in str(caught.value)
