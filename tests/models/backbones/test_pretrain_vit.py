"""mmpretrain's backbones against the stock ones, and compressed."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip('mmpretrain')

from mmengine.runner.checkpoint import load_state_dict  # noqa: E402
from mmpretrain.models import (  # noqa: E402
    DistilledVisionTransformer,
    VisionTransformer,
)
from mmpretrain.registry import MODELS  # noqa: E402
from toy import KINDS  # noqa: E402

from pm_seg.core import CLASSIFICATION  # noqa: E402
from pm_seg.models.backbones.pretrain_vit import (  # noqa: E402
    PMDistilledVisionTransformer,
    PMVisionTransformer,
)
from pm_seg.models.layers import encoder_shape  # noqa: E402
from pm_seg.utils import count_macs  # noqa: E402

DIMS = 24
ARCH = dict(
    embed_dims=DIMS, num_layers=3, num_heads=3, feedforward_channels=48
)
SMALL = dict(arch=ARCH, img_size=(64, 96), patch_size=16)
COMPRESSION = dict(keep=0.7, first=1)
PAIRS = {
    'plain': (VisionTransformer, PMVisionTransformer),
    'distilled': (DistilledVisionTransformer, PMDistilledVisionTransformer),
}
OUT_TYPES = ('raw', 'featmap', 'cls_token', 'avg_featmap')


def randomise(model: torch.nn.Module) -> None:
    """Let no parameter hide behind its initial zeros or ones."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


def build(compression: dict | None = COMPRESSION, kind='plain', **options):
    torch.manual_seed(0)
    backbone = PAIRS[kind][1](
        **{**copy.deepcopy(SMALL), 'compression': compression, **options}
    )
    backbone.init_weights()
    compressor = backbone.compressor
    if compressor is not None and compressor.needs_scores:
        compressor.set_scores(torch.rand_like(compressor.scores) + 0.01)
    return backbone.eval()


def tensors(outs: tuple) -> list[torch.Tensor]:
    return [
        t for out in outs for t in (out if isinstance(out, tuple) else [out])
    ]


def assert_like_stock(kind: str, size: tuple[int, int], **options) -> None:
    """Same keys, initial weights for a seed, frozen parts and results."""
    models = []
    for cls in PAIRS[kind]:
        torch.manual_seed(0)
        model = cls(**{**copy.deepcopy(SMALL), **copy.deepcopy(options)})
        model.init_weights()
        models.append(model)
    stock, ours = models
    stock_state, ours_state = stock.state_dict(), ours.state_dict()
    assert list(ours_state) == list(stock_state)
    for key, value in stock_state.items():
        assert torch.equal(ours_state[key], value), key
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in stock.parameters()
    ]
    assert [m.training for m in ours.patch_embed.modules()] == [
        m.training for m in stock.patch_embed.modules()
    ]
    randomise(stock)
    ours.load_state_dict(stock.state_dict())
    stock.eval()  # returns nothing there
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, actual = stock(images), ours.eval()(images)
    assert type(actual) is type(expected) and len(actual) == len(expected)
    for a, b in zip(tensors(actual), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', PAIRS)
@pytest.mark.parametrize('out_type', OUT_TYPES)
@pytest.mark.parametrize('size', [(64, 96), (97, 211), (128, 128)])
def test_equals_stock_for_every_output(kind, out_type, size) -> None:
    assert_like_stock(kind, size, out_type=out_type, out_indices=[0, 1, -1])


@pytest.mark.parametrize('kind', PAIRS)
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
    assert_like_stock(kind, (64, 112), **options)


@pytest.mark.parametrize('out_type', ['raw', 'featmap', 'avg_featmap'])
def test_equals_stock_without_cls_token(out_type: str) -> None:
    options = dict(with_cls_token=False, out_type=out_type)
    assert_like_stock('plain', (96, 96), **options)


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
    ('plain', dict(), 1),
    ('distilled', dict(), 2),
    ('plain', dict(with_cls_token=False), 0),
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


@pytest.mark.parametrize('kind', PAIRS)
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
    for kind, prefix in (('plain', 1), ('distilled', 2)):
        whole = build(COMPRESSION, kind, out_type='raw')
        reads = build(COMPRESSION, kind)
        tokens = whole(images)[0][:, :prefix]
        found = tensors(reads(images))
        for token, expected in zip(found, tokens.unbind(1)):
            torch.testing.assert_close(token, expected, rtol=1e-4, atol=1e-5)
        assert whole.compressor.gain.requires_grad
        assert not reads.compressor.gain.requires_grad
        x, grid = reads.embed(images)
        out = reads.run_layers(x, grid).last
        assert out.shape[1] == prefix + reads.compressor.tokens(grid)[-1]


def test_classification_has_its_own_defaults() -> None:
    """Keys are compared, and later layers merge more."""
    compressor = build(dict(keep=0.8)).compressor
    assert compressor.compare == 'keys'
    counts = compressor.tokens((4, 6))
    assert counts[: CLASSIFICATION['first']] == [24] * CLASSIFICATION['first']
    assert counts[-1] < 24
    assert build(dict(keep=0.8, compare='sketch')).compressor.compare != 'keys'


def test_disabled_compression_is_the_dense_model() -> None:
    compressed, dense = build(out_type='raw'), build(None, out_type='raw')
    assert dense.train() is dense and dense.eval() is dense
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), compressed.compressor.disabled():
        assert torch.equal(compressed(images)[0], dense(images)[0])


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


def test_activation_checkpointing() -> None:
    saving = build(out_type='raw', layer_cfgs=dict(with_cp=True))
    plain = build(out_type='raw')
    assert saving.layers[0].with_cp and not plain.layers[0].with_cp
    images = torch.randn(1, 3, 64, 96)
    for model in (saving, plain):
        model(images)[0].square().sum().backward()
    for a, b in zip(saving.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


# ------------------------------------------------------------------- loading


def test_checkpoints_compressed_and_dense() -> None:
    source, target = build(), build(dict(COMPRESSION, keep=0.9))
    target.load_state_dict(source.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(source(images)[0], target(images)[0])
    dense = build(None)
    with pytest.raises(RuntimeError, match='checkpoint and the model is den'):
        dense.load_state_dict(source.state_dict())
    tokens = target.compressor.tokens((4, 6))
    target.load_state_dict(dense.state_dict())
    assert target.compressor.tokens((4, 6)) == tokens


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (('layers.1.attn.qkv.weight', None), 'qkv.weight: missing'),
        (('ln1.bias', None), 'ln1.bias: missing'),
        (('layers.2.ffn.layers.1.bias', 5), r'bias: shape \(5,\), expected'),
        (('layers.3.ln1.bias', 24), 'layers.3.ln1.bias: unexpected'),
        (('dist_token', 24), 'dist_token: unexpected'),
    ],
)
@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
def test_strict(change: tuple, message: str, loader: str) -> None:
    state = build(None).state_dict()
    key, size = change
    state.pop(key, None)
    if size:
        state[key] = torch.zeros(size)
    target = build(None)
    with pytest.raises(RuntimeError, match=message):
        if loader == 'torch':
            target.load_state_dict(state, strict=False)
        else:
            load_state_dict(target, state, strict=False)


def test_position_embeddings_are_resized() -> None:
    """As in the base class, from square grids."""
    source = build(None, img_size=64)
    stock = VisionTransformer(**copy.deepcopy(SMALL))
    target = build(None)
    for model in (stock, target):
        model.load_state_dict(source.state_dict())
    assert torch.equal(target.pos_embed, stock.pos_embed)
    other = build(None, 'distilled', img_size=64)
    with pytest.raises(RuntimeError, match='pos_embed: .*PMDistilledVision'):
        target.load_state_dict(other.state_dict())


def test_the_checkpoint_of_a_model_with_cls_token() -> None:
    target = build(None, with_cls_token=False, out_type='featmap')
    target.load_state_dict(build(None).state_dict(), strict=False)


def test_pretrained_weights(tmp_path) -> None:
    """Weights from pre-training lack the norm of the pooled features."""
    source = build(None)
    path = tmp_path / 'pretrained.pth'
    state = {f'backbone.{k}': v for k, v in source.state_dict().items()}
    torch.save(dict(state_dict={**state, 'head.x': torch.ones(1)}), path)
    for prefix in (dict(), dict(prefix='backbone.')):
        target = build(
            None,
            out_type='avg_featmap',
            final_norm=False,
            init_cfg=dict(type='Pretrained', checkpoint=str(path), **prefix),
        )
        assert torch.equal(target.pos_embed, source.pos_embed)
        assert (target.ln2.weight == 1).all()
    del state['backbone.layers.0.ln1.weight']
    torch.save(dict(state_dict=state), path)
    with pytest.raises(RuntimeError, match='layers.0.ln1.weight: missing'):
        target.init_weights()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='vit-xs'), "arch='vit-xs' is unknown; choose"),
        (dict(arch=dict(num_layers=2)), 'lacks .*embed_dims'),
        (dict(out_indices=(0, 3)), r'out_indices=\(0, 3\) must lie in -3..2'),
        (dict(compression=dict(kep=0.5)), "kep=0.5; did you mean 'keep'"),
        (dict(with_cls_token=False), 'with_cls_token must be True'),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PMVisionTransformer(**{**copy.deepcopy(SMALL), **options})
