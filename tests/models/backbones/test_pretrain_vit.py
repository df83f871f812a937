"""mmpretrain's backbones against the stock ones, and compressed."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from helpers import in_one_graph, slow
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from pretrain_vits import (
    ABSOLUTE,
    BACKBONES,
    COMPRESSION,
    DIMS,
    DISTILLED,
    MODELS,
    PLAIN,
    SMALL,
    build,
    make,
)
from stock import assert_like_stock, randomise, tensors
from toy import KINDS

import pm_seg
from pm_seg.core import CLASSIFICATION
from pm_seg.models import PMVisionTransformer
from pm_seg.models.layers import encoder_shape
from pm_seg.utils import count_macs

OUT_TYPES = ('raw', 'featmap', 'cls_token', 'avg_featmap')
OUTPUTS = [
    (kind, out_type)
    for kind in BACKBONES
    for out_type in OUT_TYPES
    if (kind, out_type) != ('DeiT3', 'avg_featmap')  # fails in the stock one
]


def check(kind: str, size: tuple[int, int], **options) -> None:
    ours = partial(make, f'PM{kind}')
    images = torch.randn(2, 3, *size)
    assert_like_stock(partial(make, kind), ours, options, images)


@pytest.mark.parametrize(('kind', 'out_type'), OUTPUTS)
@pytest.mark.parametrize('size', [(64, 96), (97, 211), (128, 128)])
def test_equals_stock_for_every_output(kind, out_type, size) -> None:
    check(kind, size, out_type=out_type, out_indices=[0, 1, -1])


@pytest.mark.parametrize('kind', [PLAIN, DISTILLED])
@pytest.mark.parametrize(
    'options',
    [
        dict(pre_norm=True),
        dict(final_norm=False),
        dict(layer_scale_init_value=1e-2),
        dict(qkv_bias=False, drop_rate=0.1, drop_path_rate=0.2),
        dict(norm_cfg=dict(type='LN', eps=1e-3)),
        dict(frozen_stages=2),
        dict(frozen_stages=3, out_type='avg_featmap'),
        dict(interpolate_mode='bilinear', img_size=64),
        dict(patch_cfg=dict(stride=8, padding=4), patch_size=16),
        dict(in_channels=3, patch_size=(16, 8)),
        dict(
            layer_cfgs=dict(
                ffn_type='swiglu_fused', layer_scale_init_value=0.1
            )
        ),
        dict(
            layer_cfgs=[
                dict(act_cfg=dict(type='ReLU'), num_fcs=n) for n in (2, 3, 2)
            ]
        ),
    ],
)
def test_equals_stock_for_other_arguments(kind: str, options: dict) -> None:
    check(kind, (64, 112), **options)


@pytest.mark.parametrize('out_type', ['raw', 'featmap', 'avg_featmap'])
def test_equals_stock_without_cls_token(out_type: str) -> None:
    options = dict(with_cls_token=False, out_type=out_type)
    check(PLAIN, (96, 96), **options)


def test_drops_in_by_type_alone() -> None:
    cfg = dict(type='mmpretrain.VisionTransformer', arch='deit-tiny')
    stock = MODELS.build(cfg)
    randomise(stock)
    ours = MODELS.build({**cfg, 'type': 'mmpretrain.PMVisionTransformer'})
    load_state_dict(ours, stock.state_dict(), strict=True)
    stock.eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.eval()(images)[0], stock(images)[0], rtol=1e-4, atol=1e-4
        )


PREFIXES = [
    (PLAIN, dict(), 1),
    (DISTILLED, dict(), 2),
    (PLAIN, dict(with_cls_token=False), 0),
    ('DeiT3', dict(), 1),
    ('BEiTViT', dict(), 1),
    ('ViTEVA02', dict(), 1),
]


@pytest.mark.parametrize(('kind', 'options', 'prefix'), PREFIXES)
@pytest.mark.parametrize(
    'compression', [COMPRESSION, KINDS['paper'], KINDS['tome']]
)
@pytest.mark.parametrize('size', [(64, 96), (97, 211), (30, 200)])
def test_full_maps(kind, options, prefix, compression, size) -> None:
    grid = tuple(-(-n // 16) for n in size)
    images = torch.randn(2, 3, *size)
    expected = {
        'raw': (2, prefix + grid[0] * grid[1], DIMS),
        'featmap': (2, DIMS, *grid),
    }
    for out_type, shape in expected.items():
        options |= dict(out_type=out_type, out_indices=(0, 1, 2))
        backbone = build(compression, kind, **options)
        assert backbone.compressor.shape.num_prefix == prefix
        outs = backbone(images)
        assert [out.shape for out in outs] == [shape] * 3


@pytest.mark.parametrize('kind', [PLAIN, DISTILLED])
@pytest.mark.parametrize('out_type', OUT_TYPES)
def test_backward(kind: str, out_type: str) -> None:
    backbone = build(COMPRESSION, kind, out_type=out_type).train()
    randomise(backbone)
    outs = tensors(backbone(torch.randn(2, 3, 64, 96)))
    sum(out.square().sum() for out in outs).backward()
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@torch.no_grad()
def test_nothing_is_restored_where_prefix_tokens_alone_are_read() -> None:
    images = torch.randn(2, 3, 64, 96)
    for kind, prefix in ((PLAIN, 1), (DISTILLED, 2)):
        whole = build(COMPRESSION, kind, out_type='raw')
        reads = build(COMPRESSION, kind)
        whole.compressor.load_state_dict(reads.compressor.state_dict())
        tokens = whole(images)[0][:, :prefix]
        found = tensors(reads(images))
        for token, expected in zip(found, tokens.unbind(1)):
            torch.testing.assert_close(token, expected, rtol=1e-4, atol=1e-5)
        assert whole.compressor.gain.requires_grad
        assert reads.compressor.share < whole.compressor.share
        assert not reads.compressor.gain.requires_grad
        x, grid = reads.embed(images)
        out = reads.run_layers(x, grid).last
        assert out.shape[1] == prefix


def test_classification_has_its_own_defaults() -> None:
    """Keys are compared, and later layers merge more."""
    compressor = build(dict(keep=0.8)).compressor
    assert compressor.schedule.compare == 'keys'
    counts = compressor.tokens((4, 6))
    assert counts[: CLASSIFICATION['first']] == [24] * CLASSIFICATION['first']
    assert counts[-1] < 24
    other = build(dict(keep=0.8, compare='sketch')).compressor
    assert other.schedule.compare != 'keys'


@pytest.mark.parametrize('kind', BACKBONES)
@torch.no_grad()
def test_less_is_less_alike(kind: str) -> None:
    """Disabled, and at 1, compression is the dense model."""
    options = dict(out_type='featmap')
    dense, x = build(None, kind, **options), torch.randn(2, 3, 64, 96)
    assert dense.train() is dense and dense.eval() is dense
    randomise(dense)
    (expected,), errors = dense(x), []
    for keep in (1.0, 0.9, 0.6):
        small = build(dict(COMPRESSION, keep=keep), kind, **options)
        small.load_state_dict(dense.state_dict())
        errors.append((small(x)[0] - expected).norm() / expected.norm())
        with small.compressor.disabled():
            assert torch.equal(small(x)[0], expected)
    assert errors[0] == 0 < errors[1] < errors[2]


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(layer_scale_init_value=0.1),
        dict(layer_cfgs=dict(ffn_type='swiglu_fused')),
    ],
)
def test_layer_cost(options: dict) -> None:
    layers = build(None, **options).layers
    x = torch.randn(1, 29, DIMS)
    cost = encoder_shape(layers, (4, 7), 1).cost
    assert count_macs(lambda: layers[0](x)) == cost(29)


@in_one_graph
@pytest.mark.parametrize(
    'kind',
    [
        kind if kind in (PLAIN, 'ViTEVA02') else slow(kind)
        for kind in BACKBONES
    ],
)
@torch.no_grad()
def test_compiles_as_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    model = build(kind=kind, drop_path_rate=0.1).eval()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-3, atol=1e-3)


def test_activation_checkpointing() -> None:
    saving = build(out_type='raw', layer_cfgs=dict(with_cp=True))
    plain = build(out_type='raw')
    assert saving.layers[0].with_cp and not plain.layers[0].with_cp
    images = torch.randn(1, 3, 64, 96)
    for model in (saving, plain):
        model(images)[0].square().sum().backward()
    for a, b in zip(saving.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize('kind', [k for k in BACKBONES if k != DISTILLED])
@pytest.mark.parametrize('head', [True, False])
def test_compress_model_with_and_without_a_head(kind: str, head) -> None:
    """Without one, against its own features."""
    init_default_scope('mmpretrain')
    cls_head = dict(type='LinearClsHead', num_classes=5, in_channels=DIMS)
    backbone = {**SMALL, **BACKBONES[kind], 'type': kind, 'img_size': 64}
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=copy.deepcopy(backbone),
            head=cls_head if head else None,
        )
    ).eval()
    randomise(model)
    images = torch.randn(4, 3, 64, 64)
    batch = (images, torch.arange(4)) if head else images
    small = pm_seg.compress_model(
        model, [batch], keep=0.7, progress=False, first=1
    )
    assert small.backbone.compressor.calibrated
    assert type(small.backbone).__name__ == f'PM{kind}'
    out = small.backbone(images)[0]
    assert out.shape == (4, DIMS)
    assert not torch.equal(out, model.backbone(images)[0])
    small.train().backbone(images)[0].sum().backward()


@pytest.mark.parametrize(
    ('kind', 'options', 'message'),
    [
        (PLAIN, dict(arch='xs'), 'Arch xs is not in default archs'),
        (PLAIN, dict(arch=dict(num_layers=2)), 'needs a dict .*embed_dims'),
        (PLAIN, dict(out_indices=(0, 3)), r'\(0, 3\) must lie in -3..2'),
        (PLAIN, dict(compression=dict(kep=0.5)), "kep=0.5; did you mean 'k"),
        (PLAIN, dict(with_cls_token=False), 'with_cls_token must be True'),
        (PLAIN, ABSOLUTE, 'no argument use_abs_pos_emb'),
        ('BEiTViT', dict(use_rel_pos_bias=True), 'relative position bias'),
    ],
)
def test_bad_arguments(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(f'PM{kind}', **options)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('option', ['arch', 'init_values', 'qv_bias'])
def test_arguments_of_other_backbones_are_named(option: str) -> None:
    """mmpretrain's without scope; mmseg's BEiT and MAE, their type changed."""
    message = f"no argument {option}; .* type='mmpretrain.PMVisionTransformer'"
    with pytest.raises(ValueError, match=message):
        PMVisionTransformer(**{option: 1})
