"""Models built without pm_seg, compressed by one call."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from compressing import FEW, ONE, check, images, perturbed, timm_model
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS as PRETRAIN
from mmseg.registry import MODELS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pm_seg
from pm_seg.engine.calibration import SEARCH
from pm_seg.engine.scoring import compressible_modules

SEGMENTOR = dict(
    type='EncoderDecoder',
    data_preprocessor=tiny.PREPROCESSOR,
    backbone=dict(
        type='VisionTransformer',
        img_size=(64, 64),
        embed_dims=24,
        num_layers=3,
        num_heads=3,
        out_indices=(0, 2),
        final_norm=True,
        drop_path_rate=0.1,
        norm_cfg=dict(type='LN', eps=1e-6),
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=24,
        in_index=1,
        channels=16,
        num_convs=1,
        num_classes=5,
        norm_cfg=dict(type='BN'),
        loss_decode=dict(type='CrossEntropyLoss'),
    ),
)
CLASSIFIER = dict(
    type='ImageClassifier',
    data_preprocessor=dict(
        mean=[127.5] * 3, std=[127.5] * 3, num_classes=10, to_rgb=True
    ),
    backbone=dict(
        type='VisionTransformer',
        arch=dict(
            embed_dims=24,
            num_layers=3,
            num_heads=3,
            feedforward_channels=48,
        ),
        img_size=64,
    ),
    head=dict(
        type='VisionTransformerClsHead',
        num_classes=10,
        in_channels=24,
        loss=dict(type='CrossEntropyLoss'),
    ),
)


@pytest.fixture
def segmentor() -> nn.Module:
    init_default_scope('mmseg')
    return perturbed(MODELS.build(copy.deepcopy(SEGMENTOR)))


@pytest.fixture
def classifier() -> nn.Module:
    init_default_scope('mmpretrain')
    yield perturbed(PRETRAIN.build(copy.deepcopy(CLASSIFIER)))
    init_default_scope('mmseg')


def test_segmentor_with_the_stock_backbone(segmentor: nn.Module) -> None:
    before = {k: v.clone() for k, v in segmentor.state_dict().items()}
    loader = [tiny.batch(0, 2), tiny.batch(2, 2)]
    steps = []
    small = pm_seg.compress_model(
        segmentor,
        loader,
        keep=0.5,
        measuring=FEW,
        progress=lambda *step: steps.append(step),
    )
    x = images()
    check(segmentor, small, lambda m: m(x, mode='tensor'))
    assert type(small.backbone).__name__ == 'PMVisionTransformer'
    assert type(segmentor.backbone).__name__ == 'VisionTransformer'
    for key, value in segmentor.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not small.training
    assert ('Importance of tokens', 2, 2) in steps
    # What it is made from gives the same, and so does its state.
    again = pm_seg.make_compressible(segmentor, keep=0.5)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x, mode='tensor'), small(x, mode='tensor'))
    # It trains.
    data = small.data_preprocessor(tiny.batch(0, 2), training=True)
    losses = small.train()(**data, mode='loss')
    small.parse_losses(losses)[0].backward()
    for name in ('patch_embed.projection.weight', 'compressor.gain'):
        assert small.backbone.get_parameter(name).grad.abs().max() > 0


def test_segmentor_with_plain_tensors_and_a_target(segmentor) -> None:
    """Labels as maps; options of the compressor; the model's config."""
    segmentor.cfg = Config(dict(model=copy.deepcopy(SEGMENTOR)))
    labels = torch.randint(0, 5, (4, 64, 64))
    pixels = torch.randint(0, 255, (4, 3, 64, 64)).float()
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=2)
    small = pm_seg.compress_model(
        segmentor,
        loader,
        target=dict(share=0.85),
        measuring=FEW,
        restore='replace',
        power=3.0,
        progress=False,
    )
    x = images()
    check(segmentor, small, lambda m: m(x, mode='tensor'))
    compressor = small.backbone.compressor
    assert compressor.restore == 'replace'
    assert compressor.schedule.power / 3 in SEARCH['power']
    backbone = small.cfg.model.backbone
    assert backbone.type == 'PMVisionTransformer'
    assert backbone.compression.power == 3.0
    assert segmentor.cfg.model.backbone.type == 'VisionTransformer'


@pytest.mark.parametrize('kind', ['', 'Distilled', 'PM'])
def test_classifier(classifier: nn.Module, kind: str) -> None:
    if kind:
        config = copy.deepcopy(CLASSIFIER)
        config['backbone']['type'] = kind + 'VisionTransformer'
        if kind == 'Distilled':
            config['head']['type'] = 'DeiTClsHead'
        config['backbone']['layer_scale_init_value'] = 0.1
        classifier = perturbed(PRETRAIN.build(config))
    loader = [(images(), torch.arange(4))] * 2
    small = pm_seg.compress_model(
        classifier.train(), loader, keep=0.8, measuring=FEW
    )
    assert small.training
    x = images()
    check(classifier.eval(), small.eval(), lambda m: m(x, mode='tensor'))


def test_models_and_batches_of_another_kind(segmentor: nn.Module) -> None:
    call = pm_seg.compress_model
    with pytest.raises(ValueError, match='Linear is not supported'):
        call(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match='is a wrapper'):
        call(nn.DataParallel(segmentor), [])
    with pytest.raises(ValueError, match='can be gone through once only'):
        call(segmentor, iter([tiny.batch(0, 1)]))
    with pytest.raises(ValueError, match=r"dict\['image'\]; expected dict"):
        call(segmentor, [dict(image=1)])
    with pytest.raises(ValueError, match='maps .B, H, W. for mmseg'):
        call(segmentor, [(images(), torch.zeros(4, 2))])
    with pytest.raises(ValueError, match='scores need images: pass a data'):
        call(segmentor, None, type='paper')
    with pytest.raises(ValueError, match='exclude each other'):
        call(segmentor, [], keep=0.5, target=dict(share=0.5))
    with pytest.raises(ValueError, match='loss is for timm'):
        call(segmentor, [], loss=nn.functional.cross_entropy)
    segmentor.backbone = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match='Conv2d is not supported'):
        call(segmentor, [tiny.batch(0, 1)])


def test_a_backbone_of_parts_of_its_own(segmentor: nn.Module) -> None:
    """It keeps them: other layers, hooks, what is frozen."""
    backbone = segmentor.backbone
    backbone.layers[2].ffn.layers[0][1] = nn.ReLU()
    backbone.layers[0].requires_grad_(False)
    small = pm_seg.make_compressible(segmentor, keep=0.5)
    x = images()
    compressor = small.backbone.compressor
    assert not torch.equal(small(x, mode='tensor'), segmentor(x))
    with compressor.disabled():
        torch.testing.assert_close(
            small(x, mode='tensor'), segmentor(x), rtol=1e-4, atol=1e-4
        )
    frozen = [n for n, p in small.named_parameters() if not p.requires_grad]
    assert frozen == [
        n for n, p in segmentor.named_parameters() if not p.requires_grad
    ]


def test_what_is_not_carried_over_is_noticed(segmentor, monkeypatch) -> None:
    """A subtly changed backbone is refused, not silently replaced."""
    layers = segmentor.backbone.layers
    stock = type(layers[2])
    forward = stock.forward
    layers[2].__class__ = type('Louder', (stock,), {})
    with pytest.raises(ValueError, match='a layer is of type Louder'):
        pm_seg.make_compressible(segmentor)
    layers[2].__class__ = stock
    monkeypatch.setattr(
        stock, 'forward', lambda self, x: 1.01 * forward(self, x)
    )
    with pytest.raises(ValueError, match='differs from it'):
        pm_seg.make_compressible(segmentor)


@pytest.mark.parametrize('kind', ['tome', 'algm', 'paper'])
def test_all_kinds_compress_any_model(segmentor: nn.Module, kind) -> None:
    """To the same share of operations."""
    x = images()
    for model, loader, run in (
        (segmentor, [tiny.batch(0, 2)], lambda m: m(x, mode='tensor')),
        (timm_model(), [x], lambda m: m(x)),
    ):
        small = pm_seg.compress_model(
            model, loader, keep=0.8, type=kind, measuring=ONE
        )
        check(model, small, run)
        (module,) = compressible_modules(small).values()
        assert 0.6 < module.compressor.share <= 0.8


def test_a_model_with_its_own_compression() -> None:
    model = tiny.build(keep=0.9)
    loader = [tiny.batch(0, 2)]
    small = pm_seg.compress_model(model, loader, keep=0.6, measuring=ONE)
    assert small.backbone.compressor.keep == 0.6
    assert small.backbone.compressor.calibrated
    assert model.backbone.compressor.keep == 0.9
    assert not model.backbone.compressor.compressed
    with pytest.raises(ValueError, match='keep alone'):
        pm_seg.compress_model(model, loader, restore='replace')
    with pytest.raises(ValueError, match='keep=2'):
        pm_seg.compress_model(model, loader, keep=2)


def test_the_check_runs_without_tf32(monkeypatch) -> None:
    """Which rounds equal models more differently than is allowed."""
    init_default_scope('mmseg')
    model, seen = MODELS.build(SEGMENTOR), []
    model.backbone.register_forward_pre_hook(
        lambda *args: seen.append(torch.get_float32_matmul_precision())
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high')
    try:
        pm_seg.make_compressible(model)
        assert torch.get_float32_matmul_precision() == 'high'
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == 2 * ['highest']  # before and after
