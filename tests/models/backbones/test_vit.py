"""The backbone against the stock one, and compressed."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS
from stock import assert_like_stock
from toy import KINDS
from vits import SMALL, build

from pm_seg.models import PMVisionTransformer


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(out_indices=(0, 1, 2)),
        dict(out_indices=[2], out_origin=True),
        dict(with_cls_token=False),
        dict(output_cls_token=True, out_origin=True),
        dict(final_norm=True, norm_cfg=dict(type='LN', eps=1e-6)),
        dict(pre_norm=True),
        dict(patch_norm=True),
        dict(qkv_bias=False),
        dict(patch_pad='same', interpolate_mode='bilinear'),
        dict(num_fcs=3, mlp_ratio=2, act_cfg=dict(type='ReLU')),
        dict(img_size=64, drop_path_rate=0.1, drop_rate=0.1),
        dict(norm_eval=True, frozen_exclude=['layers']),
    ],
)
@pytest.mark.parametrize('size', [(64, 96), (97, 211), (128, 128)])
def test_equals_stock_without_compression(options: dict, size) -> None:
    arguments = {**SMALL, 'patch_bias': True, **options}
    images = torch.randn(2, 3, *size)
    assert_like_stock(
        VisionTransformer, PMVisionTransformer, arguments, images
    )


def test_drops_in_by_type_alone() -> None:
    """A config without patch_bias: the checkpoint has no bias either."""
    stock = MODELS.build(dict(type='mmseg.VisionTransformer', **SMALL))
    stock.init_weights()
    ours = MODELS.build(dict(type='mmseg.PMVisionTransformer', **SMALL))
    ours.init_weights()
    load_state_dict(ours, stock.state_dict(), strict=True)
    assert (ours.patch_embed.projection.bias == 0).all()
    stock.eval()  # returns nothing there
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(ours.eval()(images), stock(images)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('cls_token', [True, False])
@pytest.mark.parametrize('compression', KINDS.values(), ids=KINDS)
@pytest.mark.parametrize('size', [(64, 96), (97, 211), (30, 200)])
def test_full_maps_of_any_size(cls_token, compression, size) -> None:
    """At every level, for each image of a batch on its own."""
    backbone = build(
        compression, with_cls_token=cls_token, out_indices=(0, 1, 2)
    )
    images = torch.randn(3, 3, *size)
    images[1] *= 5
    images[2] = 0
    outs = backbone(images)
    grid = tuple(-(-n // 16) for n in size)
    assert [out.shape for out in outs] == [(3, 24, *grid)] * 3
    with torch.no_grad():
        for i in range(3):
            single = backbone(images[i : i + 1])
            for a, b in zip(single, outs):
                torch.testing.assert_close(
                    a, b[i : i + 1], rtol=1e-4, atol=1e-4
                )
    sum(out.square().sum() for out in outs).backward()
    for name, parameter in backbone.compressor.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_compression_runs_on_fewer_tokens() -> None:
    backbone = build(dict(keep=0.6))
    seen = []
    for layer in backbone.layers:
        layer.ffn.register_forward_hook(
            lambda m, args, out: seen.append(out.shape[1] - 1)
        )
    backbone(torch.randn(1, 3, 64, 96))
    assert seen == [load.kept for load in backbone.compressor.loads()]
    assert seen[0] == 24 > seen[1] > seen[2]


def test_outputs_are_a_tuple_that_knows_the_groups() -> None:
    images = torch.randn(2, 3, 64, 96)
    outs = build(dict(keep=0.6), out_indices=(0, 2))(images)
    assert isinstance(outs, tuple) and len(outs) == 2
    assert outs.groups.place.shape == (2, 24)
    first, last = outs
    assert outs[1] is last and tuple(outs) == (first, last)
    assert not hasattr(outs[:1], 'groups'), 'a part is a plain tuple'
    for compression in (None, dict(keep=1.0), KINDS['paper']):
        assert build(compression)(images).groups is None


def test_keeping_all_is_the_dense_model() -> None:
    """Bit for bit."""
    dense = build(None)
    compressed = build(dict(keep=1.0))
    compressed.load_state_dict(dense.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(compressed(images), dense(images)):
            assert torch.equal(a, b)


@pytest.mark.parametrize('compression', [None, dict(keep=0.6)])
def test_activation_checkpointing(compression) -> None:
    """Same results and gradients, also with the first layers frozen."""
    plain = build(compression, drop_path_rate=0.0).train()
    saving = build(compression, with_cp=True, drop_path_rate=0.0).train()
    images = torch.randn(2, 3, 64, 96)
    for model in (plain, saving):
        model.layers[0].requires_grad_(False)
        model.patch_embed.requires_grad_(False)
        model(images)[0].square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), saving.parameters()):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_autocast_and_bfloat16() -> None:
    backbone = build(dict(keep=0.6))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        (exact,) = backbone(images)
        with torch.autocast('cpu', torch.bfloat16):
            (mixed,) = backbone(images)
        half = copy.deepcopy(backbone).to(torch.bfloat16)
        (low,) = half(images.to(torch.bfloat16))
    assert low.dtype == torch.bfloat16
    scale = exact.abs().max()
    assert (mixed.float() - exact).abs().max() < 0.05 * scale
    assert (low.float() - exact).abs().max() < 0.05 * scale


def test_frozen_parts() -> None:
    backbone = build(
        dict(keep=0.6), frozen_exclude=['compressor', 'layers.2']
    ).train()
    backbone(torch.randn(2, 3, 64, 96))[0].sum().backward()
    for name, parameter in backbone.named_parameters():
        free = 'compressor' in name or 'layers.2' in name
        assert parameter.requires_grad == free
        assert (parameter.grad is not None) == free


def test_train_returns_self() -> None:
    backbone = build(dict(keep=0.6))
    assert backbone.train() is backbone
    assert backbone.eval() is backbone


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(out_indices=(0, 3)), r'out_indices=\(0, 3\) must lie in -3..2'),
        (dict(compression=dict(kep=0.5)), "kep=0.5; did you mean 'keep'"),
        (dict(compression=dict(keep=2)), 'keep=2 is not in'),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PMVisionTransformer(**{**SMALL, **options})
