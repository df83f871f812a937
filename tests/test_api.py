"""Models built without pm_seg, compressed by one call."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.registry import MODELS as PRETRAIN
from mmseg.registry import MODELS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pm_seg
from pm_seg.engine import describe

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


def perturbed(model: nn.Module) -> nn.Module:
    """Weights as large as trained ones: fresh ones change no token much."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(
            parameter.shape, generator=generator
        )
    return model.eval()


@pytest.fixture
def segmentor() -> nn.Module:
    init_default_scope('mmseg')
    return perturbed(MODELS.build(copy.deepcopy(SEGMENTOR)))


@pytest.fixture
def classifier() -> nn.Module:
    init_default_scope('mmpretrain')
    yield perturbed(PRETRAIN.build(copy.deepcopy(CLASSIFIER)))
    init_default_scope('mmseg')


def timm_model(name: str = 'vit_tiny_patch16_224', **options) -> nn.Module:
    timm = pytest.importorskip('timm')
    options = (
        dict(img_size=64, embed_dim=24, depth=3, num_heads=3, num_classes=10)
        | options
    )
    return perturbed(timm.create_model(name, **options))


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64)


@torch.no_grad()
def check(dense: nn.Module, small: nn.Module, run) -> None:
    """Compressed: other outputs; disabled: those of the dense model."""
    expected, got = run(dense), run(small)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() > 1e-3 * expected.abs().max()
    name, module = next(
        (n, m) for n, m in small.named_modules() if hasattr(m, 'compressor')
    )
    with module.compressor.disabled():
        torch.testing.assert_close(run(small), expected, rtol=1e-4, atol=1e-4)
    # Not int(0.5 * 16): a loss-driven budget trades layers for each other.
    groups = module.compressor.num_groups
    assert sum(groups) < 3 * 16 and name in describe(small)


def test_segmentor_with_the_stock_backbone(segmentor: nn.Module) -> None:
    before = {k: v.clone() for k, v in segmentor.state_dict().items()}
    loader = [tiny.batch(0, 2), tiny.batch(2, 2)]
    steps = []
    small = pm_seg.compress_model(
        segmentor,
        loader,
        keep=0.5,
        num_batches=2,
        progress=lambda *step: steps.append(step),
    )
    x = images()
    check(segmentor, small, lambda m: m(x, mode='tensor'))
    assert type(small.backbone).__name__ == 'PMVisionTransformer'
    assert type(segmentor.backbone).__name__ == 'VisionTransformer'
    for key, value in segmentor.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not small.training
    assert ('Scoring batches', 2, 2) in steps
    # What it is made from gives the same, and so does its state.
    again = pm_seg.make_compressible(segmentor, keep=0.5)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x, mode='tensor'), small(x, mode='tensor'))
    # It trains.
    data = small.data_preprocessor(tiny.batch(0, 2), training=True)
    losses = small.train()(**data, mode='loss')
    small.parse_losses(losses)[0].backward()
    assert small.backbone.patch_embed.projection.weight.grad.abs().max() > 0


def test_segmentor_with_plain_tensors_and_a_target(segmentor) -> None:
    """Labels as maps; options of the compressor; the model's config."""
    segmentor.cfg = Config(dict(model=copy.deepcopy(SEGMENTOR)))
    labels = torch.randint(0, 5, (4, 64, 64))
    pixels = torch.randint(0, 255, (4, 3, 64, 64)).float()
    loader = DataLoader(TensorDataset(pixels, labels), batch_size=2)
    small = pm_seg.compress_model(
        segmentor,
        loader,
        target=dict(backbone_share=0.7),
        num_batches=3,
        restore='replace',
        layers=[1, 2],
    )
    x = images()
    check(segmentor, small, lambda m: m(x, mode='tensor'))
    compressor = small.backbone.compressor
    assert compressor.mode == 'replace' and compressor.num_groups[0] == 16
    backbone = small.cfg.model.backbone
    assert backbone.type == 'PMVisionTransformer'
    assert backbone.compression.layers == [1, 2]
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
        classifier.train(), loader, keep=0.5, num_batches=2
    )
    assert small.training
    x = images()
    check(classifier.eval(), small.eval(), lambda m: m(x, mode='tensor'))


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('vit_tiny_patch16_224', {}),
        ('vit_tiny_patch16_224', dict(reg_tokens=2, init_values=0.1)),
        (
            'vit_tiny_patch16_224',
            dict(global_pool='avg', class_token=False, qk_norm=True),
        ),
        ('deit_tiny_distilled_patch16_224', {}),
    ],
)
def test_timm(name: str, options: dict) -> None:
    model = timm_model(name, **options)
    batches = [(images(), torch.arange(4)), (images(), torch.arange(4))]
    small = pm_seg.compress_model(model, batches, keep=0.5, num_batches=2)
    x = images()
    check(model, small, lambda m: m(x))
    check(model, small, lambda m: m.forward_features(x))
    features = small.forward_features(x)
    assert torch.equal(small.forward_head(features), small(x))
    small.train()(x).sum().backward()
    assert small.patch_embed.proj.weight.grad.abs().max() > 0


def test_timm_saves_and_loads() -> None:
    model = timm_model()
    small = pm_seg.compress_model(model, [images()], num_batches=1)
    again = pm_seg.make_compressible(timm_model(), keep=0.7)
    # The dense checkpoint loads too, and leaves the compressor alone.
    again.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match='no structure yet'):
        again(images())
    again.load_state_dict(small.state_dict())
    x = images()
    assert torch.equal(again(x), small(x))


def test_timm_scores_are_those_of_the_formula() -> None:
    """sum_q A dL/dA of an explicit attention map, in double precision."""
    model = timm_model().double()
    x, labels = images().double(), torch.arange(4)
    small = pm_seg.compress_model(model, [(x, labels)], num_batches=1)
    attention = model.blocks[1].attn
    maps = []

    def explicit(tokens: torch.Tensor, **kwargs) -> torch.Tensor:
        qkv = attention.qkv(tokens).unflatten(-1, (3, 3, 8))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * attention.scale).softmax(-1)
        weights.retain_grad()
        maps.append(weights)
        out = (weights @ v).transpose(1, 2).flatten(2)
        return attention.proj(out)

    attention.forward = explicit
    nn.functional.cross_entropy(model(x), labels).backward()
    score = (maps[0] * maps[0].grad).sum((1, 2))[:, 1:].abs()
    expected = score.sum(0) / (3 * 17)
    got = small.blocks.compressor.scores[1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_timm_without_labels_uses_its_own_predictions() -> None:
    model = timm_model()
    x = images()
    own = model(x).argmax(-1)
    one = pm_seg.compress_model(model, [x], num_batches=1)
    two = pm_seg.compress_model(model, [(x, own)], num_batches=1)
    other = pm_seg.compress_model(model, [(x, own.roll(1))], num_batches=1)
    scores = [m.blocks.compressor.scores for m in (one, two, other)]
    assert torch.equal(scores[0], scores[1])
    assert not torch.allclose(scores[0], scores[2])


def test_timm_parts_that_run_single_blocks_say_so() -> None:
    small = pm_seg.compress_model(timm_model(), [images()], num_batches=1)
    with pytest.raises(RuntimeError, match='run as a whole'):
        small.forward_intermediates(images())


@pytest.mark.parametrize(
    ('options', 'compression', 'message'),
    [
        (dict(num_classes=0), {}, 'no classifier'),
        (dict(dynamic_img_size=True), {}, 'dynamic_img_size=False'),
        (dict(patch_drop_rate=0.5), {}, 'patch_drop_rate'),
        ({}, dict(type='tome'), "type='tome'"),
        ({}, dict(keeep=0.5), 'unknown key'),
    ],
)
def test_timm_models_that_do_not_fit(options, compression, message) -> None:
    model = timm_model(**options)
    with pytest.raises(ValueError, match=message):
        pm_seg.compress_model(model, [images()], **compression)


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
    with pytest.raises(ValueError, match='pass a list'):
        call(segmentor, None)
    with pytest.raises(ValueError, match='exclude each other'):
        call(segmentor, [], keep=0.5, target=dict(share=0.5))
    with pytest.raises(ValueError, match='loss is for timm'):
        call(segmentor, [], loss=nn.functional.cross_entropy)
    segmentor.backbone = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match='Conv2d is not supported'):
        call(segmentor, [tiny.batch(0, 1)])


def test_options_that_are_not_carried_over_are_noticed() -> None:
    """A subtly changed backbone is refused, not silently replaced."""
    init_default_scope('mmseg')
    model = perturbed(MODELS.build(copy.deepcopy(SEGMENTOR)))
    model.backbone.layers[2].ffn.layers[0][1] = nn.ReLU()
    with pytest.raises(ValueError, match='differs from it'):
        pm_seg.make_compressible(model)


def test_a_model_with_its_own_compression() -> None:
    model = tiny.build()
    loader = [tiny.batch(0, 2)]
    small = pm_seg.compress_model(model, loader, keep=0.25, num_batches=1)
    for module in (small.backbone, small.decode_head):
        assert module.compressor.keep == 0.25
        assert module.compressor.has_structure
    assert not model.backbone.compressor.has_structure
    with pytest.raises(ValueError, match='keep alone'):
        pm_seg.compress_model(model, loader, restore='replace')
    with pytest.raises(ValueError, match='keep=2'):
        pm_seg.compress_model(model, loader, keep=2)
