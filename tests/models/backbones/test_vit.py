"""The backbone against the stock one, and compressed."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS

from pm_seg.models import PMVisionTransformer

SMALL = dict(
    img_size=(64, 96), patch_size=16, embed_dims=24, num_layers=3, num_heads=3
)
COMPRESSION = dict(keep=0.5, prune=0.1)


def build(compression: dict | None = COMPRESSION, **options):
    torch.manual_seed(0)
    backbone = PMVisionTransformer(
        **{**SMALL, 'compression': compression, **options}
    )
    backbone.init_weights()
    if compression is not None:
        compressor = backbone.compressor
        if compressor.uses_scores:
            compressor.set_scores(torch.rand_like(compressor.scores) + 0.01)
    return backbone.eval()


def tensors(outs) -> list[torch.Tensor]:
    return [
        t for out in outs for t in (out if isinstance(out, list) else [out])
    ]


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
    """Same keys, same initial weights for a seed, same results."""
    arguments = {**SMALL, 'patch_bias': True, **options}
    torch.manual_seed(0)
    stock = VisionTransformer(**copy.deepcopy(arguments))
    stock.init_weights()
    torch.manual_seed(0)
    ours = PMVisionTransformer(**copy.deepcopy(arguments))
    ours.init_weights()
    ours_state, stock_state = ours.state_dict(), stock.state_dict()
    assert list(ours_state) == list(stock_state)
    for key, value in stock_state.items():
        assert torch.equal(ours_state[key], value), key
    assert [p.requires_grad for p in ours.parameters()] == [
        p.requires_grad for p in stock.parameters()
    ]
    stock.eval()
    ours.eval()
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected, actual = tensors(stock(images)), tensors(ours(images))
    assert len(expected) == len(actual)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


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


def test_keeps_a_patch_bias() -> None:
    source = build(None)
    torch.nn.init.normal_(source.patch_embed.projection.bias)
    target = build(None)
    target.load_state_dict(source.state_dict())
    assert torch.equal(
        target.patch_embed.projection.bias, source.patch_embed.projection.bias
    )
    without = build(None, patch_bias=False)
    with pytest.raises(RuntimeError, match='projection.bias: unexpected'):
        without.load_state_dict(source.state_dict())


@pytest.mark.parametrize('cls_token', [True, False])
@pytest.mark.parametrize('restore', ['replace', 'residual'])
@pytest.mark.parametrize('builder', ['row_window', 'nearest_centre'])
@pytest.mark.parametrize('size', [(64, 96), (96, 64), (97, 211), (30, 200)])
def test_full_maps_of_any_size(cls_token, restore, builder, size) -> None:
    backbone = build(
        dict(keep=0.5, restore=restore, builder=builder),
        with_cls_token=cls_token,
        out_indices=(0, 1, 2),
    )
    outs = backbone(torch.randn(2, 3, *size))
    grid = tuple(-(-n // 16) for n in size)
    assert [out.shape for out in outs] == [(2, 24, *grid)] * 3
    sum(out.square().sum() for out in outs).backward()
    assert all(
        torch.isfinite(p.grad).all()
        for n, p in backbone.named_parameters()
        if p.grad is not None
    )
    assert backbone.compressor.restore_weight.grad.abs().sum() > 0


def test_compression_runs_on_fewer_tokens() -> None:
    backbone = build(dict(keep=0.5, budget='layer', layers=[1, 2]))
    seen = []
    for layer in backbone.layers:
        layer.ffn.register_forward_hook(
            lambda m, args, out: seen.append(out.shape[1])
        )
    backbone(torch.randn(1, 3, 64, 96))
    assert seen == [25, 13, 13]


def test_span_merges_once() -> None:
    """Outputs inside a span are full maps and do not change the others."""
    options = dict(keep=0.5, budget='layer', layers=[1, 2], span=2)
    inside = build(options, out_indices=(0, 1, 2))
    last = build(options)
    images = torch.randn(2, 3, 64, 96)
    seen = []
    for layer in inside.layers:
        layer.ffn.register_forward_hook(
            lambda m, args, out: seen.append(out.shape[1])
        )
    with torch.no_grad():
        outs = inside(images)
        assert [out.shape for out in outs] == [(2, 24, 4, 6)] * 3
        assert torch.equal(outs[-1], last(images)[0])
        assert not torch.equal(outs[1], outs[2])
    assert seen == [25, 13, 13]


def test_identity_structure_is_the_dense_model() -> None:
    """keep=1: every token its own group, bit for bit the dense model."""
    dense = build(None)
    compressed = build(dict(keep=1.0))
    compressed.load_state_dict(dense.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(compressed(images), dense(images)):
            assert torch.equal(a, b)


@pytest.mark.parametrize('size', [(64, 96), (97, 211)])
def test_batch_of_mixed_content(size) -> None:
    backbone = build()
    images = torch.randn(4, 3, *size)
    images[1] *= 5
    images[2] = 0
    with torch.no_grad():
        (whole,) = backbone(images)
        for i in range(4):
            (single,) = backbone(images[i : i + 1])
            torch.testing.assert_close(
                single, whole[i : i + 1], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize('compression', [None, COMPRESSION])
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
    backbone = build()
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
    backbone = build(frozen_exclude=['compressor', 'layers.2']).train()
    backbone(torch.randn(2, 3, 64, 96))[0].sum().backward()
    for name, parameter in backbone.named_parameters():
        free = 'compressor' in name or 'layers.2' in name
        assert parameter.requires_grad == free
        assert (parameter.grad is not None) == free


def test_train_returns_self() -> None:
    backbone = build()
    assert backbone.train() is backbone
    assert backbone.eval() is backbone


@pytest.mark.parametrize('size', [(64, 96), (97, 211)])
@pytest.mark.parametrize(
    'options', [{}, dict(span=2), dict(prune=0.2), dict(type='tome')]
)
def test_compiles_without_graph_break(size, options) -> None:
    """Forward and backward, once for all images of a size."""
    torch._dynamo.reset()
    backbone = build(dict(keep=0.5, **options), drop_path_rate=0.0)
    compiled = torch.compile(backbone, fullgraph=True, backend='aot_eager')
    images = torch.randn(1, 3, *size)
    expected = backbone(images)[0]  # derives the maps of a new grid
    found = compiled(images)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = []
    for out in (expected, found):
        backbone.zero_grad()
        out.sin().sum().backward()
        gradients.append([p.grad for p in backbone.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    if hasattr(torch.compiler, 'set_stance'):  # torch >= 2.6
        with torch.compiler.set_stance('fail_on_recompile'):
            compiled(torch.randn(1, 3, *size))


def test_needs_a_structure() -> None:
    backbone = PMVisionTransformer(**SMALL, compression=COMPRESSION)
    with pytest.raises(RuntimeError, match='there is no structure yet'):
        backbone(torch.randn(1, 3, 64, 96))


def changed(state: dict, change) -> dict:
    state = dict(state)
    change(state)
    return state


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda s: s.pop('layers.1.ln2.weight'),
            r'layers.1.ln2.weight: missing, expected \(24,\)',
        ),
        (
            lambda s: s.update({'layers.3.ln1.bias': torch.zeros(24)}),
            'layers.3.ln1.bias: unexpected',
        ),
        (
            lambda s: s.update({'cls_token': torch.zeros(1, 1, 25)}),
            r'cls_token: shape \(1, 1, 25\), expected \(1, 1, 24\)',
        ),
        (
            lambda s: s.update({'pos_embed': torch.zeros(1, 17, 24)}),
            r'pos_embed: .*set img_size .* img_size=\(64, 96\)',
        ),
    ],
)
@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
def test_loading_fails_loudly(change, message: str, loader: str) -> None:
    """Also through mmengine, which would only log what does not fit."""
    source, target = build(None), build(None)
    before = copy.deepcopy(target.state_dict())
    state = changed(source.state_dict(), change)
    with pytest.raises(RuntimeError, match=message):
        if loader == 'torch':
            target.load_state_dict(state, strict=False)
        else:
            load_state_dict(target, state, strict=False)
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key])


def test_compressed_and_dense_checkpoints() -> None:
    compressed, dense = build(), build(None)
    with pytest.raises(RuntimeError, match='compressed checkpoint, the con'):
        dense.load_state_dict(compressed.state_dict())
    fresh = PMVisionTransformer(**SMALL, compression=COMPRESSION)
    fresh.load_state_dict(dense.state_dict())
    assert not fresh.compressor.has_structure
    fresh.load_state_dict(compressed.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(fresh.eval()(images), compressed(images)):
            assert torch.equal(a, b)
    other = PMVisionTransformer(
        **{**SMALL, 'img_size': (64, 64)}, compression=COMPRESSION
    )
    with pytest.raises(RuntimeError, match='made for another grid'):
        other.load_state_dict(compressed.state_dict())


def test_pretrained_weights(tmp_path) -> None:
    """A checkpoint of a whole segmentor on another, square grid."""
    source = build(None, img_size=128)
    path = tmp_path / 'pretrained.pth'
    state = {f'backbone.{k}': v for k, v in source.state_dict().items()}
    state['decode_head.weight'] = torch.zeros(3)
    torch.save(dict(state_dict=state), path)
    target = PMVisionTransformer(
        **SMALL, init_cfg=dict(type='Pretrained', checkpoint=str(path))
    )
    target.init_weights()
    assert torch.equal(
        target.layers[1].attn.attn.in_proj_weight,
        source.layers[1].attn.attn.in_proj_weight,
    )
    del state['backbone.layers.0.ln1.weight']
    torch.save(dict(state_dict=state), path)
    with pytest.raises(RuntimeError, match='layers.0.ln1.weight: missing'):
        target.init_weights()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(out_indices=(0, 3)), r'out_indices=\[0, 3\] must lie in 0..2'),
        (dict(compression=dict(kep=0.5)), "unknown key .*'kep'"),
        (dict(compression=dict(keep=2)), 'keep=2 is not in'),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PMVisionTransformer(**{**SMALL, **options})
