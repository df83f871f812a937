"""mmpretrain's DeiT III, EVA and EVA-02."""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS
from torch import nn

import pm_seg
from pm_seg.models import PMVisionTransformer

ARCH = dict(embed_dims=48, num_layers=3, num_heads=3, feedforward_channels=96)
PLAIN = dict(use_abs_pos_emb=True, use_rel_pos_bias=False)
KINDS = {
    'DeiT3': {},
    'BEiTViT': dict(PLAIN, layer_scale_init_value=0.1, bias='qv_bias'),
    'ViTEVA02': dict(sub_ln=True, final_norm=False, out_type='avg_featmap'),
    'VisionTransformer': {},
}


def build(kind: str, head: bool = False, **options) -> nn.Module:
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    options = {**KINDS.get(kind.removeprefix('PM'), {}), **options}
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type=kind, arch=dict(ARCH), img_size=64, **options),
            head=dict(type='LinearClsHead', num_classes=5, in_channels=48)
            if head
            else None,
        )
    )
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize('kind', ['DeiT3', 'BEiTViT', 'ViTEVA02'])
@torch.no_grad()
def test_same_as_stock_and_compressed(kind: str) -> None:
    stock, x = build(kind).backbone, torch.randn(2, 3, 64, 64)
    ours = build(f'PM{kind}').backbone
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours(x), stock(x), rtol=1e-5, atol=1e-5)
    other = torch.randn(2, 3, 80, 96)
    torch.testing.assert_close(ours(other), stock(other), rtol=1e-4, atol=1e-5)
    stock = build(kind).backbone  # the rotary tables of ViTEVA02 changed
    errors = []
    for keep in (1.0, 0.9, 0.5):
        small = build(f'PM{kind}', compression=dict(keep=keep, first=1))
        small = small.backbone
        small.load_state_dict(stock.state_dict())
        (expected,), (got,) = stock(x), small(x)
        errors.append((got - expected).norm() / expected.norm())
        with small.compressor.disabled():
            dense = small(x)[0]
            torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)
            assert keep < 1 or torch.equal(got, dense)
        assert small(other)[0].shape == stock(other)[0].shape
        stock = build(kind).backbone
    assert errors[0] < 1e-4 < errors[1] < errors[2]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('head', [True, False])
def test_compress_model_with_and_without_a_head(kind: str, head) -> None:
    """Without one, against its own features."""
    model = build(kind, head)
    images = torch.randn(4, 3, 64, 64)
    batch = (images, torch.arange(4)) if head else images
    small = pm_seg.compress_model(
        model, [batch], keep=0.7, progress=False, first=1
    )
    assert small.backbone.compressor.has_importance
    assert type(small.backbone).__name__ == f'PM{kind}'
    out = small.backbone(images)[0]
    assert out.shape == (4, 48)
    assert not torch.equal(out, model.backbone(images)[0])
    small.train().backbone(images)[0].sum().backward()


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        ('PMBEiTViT', dict(use_rel_pos_bias=True), 'relative position bias'),
        ('PMVisionTransformer', PLAIN, 'no argument use_abs_pos_emb'),
    ],
)
def test_what_does_not_fit_says_so(kind: str, options, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(kind, **options)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('option', ['arch', 'init_values', 'qv_bias'])
def test_arguments_of_other_backbones_are_named(option: str) -> None:
    """mmpretrain's without scope; mmseg's BEiT and MAE, their type changed."""
    message = f"no argument {option}; .* type='mmpretrain.PMVisionTransformer'"
    with pytest.raises(ValueError, match=message):
        PMVisionTransformer(**{option: 1})
