"""timm's Vision Transformers, compressed: every kind, on random weights."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import architectures
import pytest
import torch
from helpers import needs_exporter, slow
from torch import Tensor, nn

import pm_seg
from pm_seg.cli.export_onnx import compare, export
from pm_seg.core import make_compressor
from pm_seg.models.layers import encoder_shape
from pm_seg.models.timm_layers import TimmLayer
from pm_seg.models.timm_vit import embed, geometry

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(params=architectures.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def compress(model: nn.Module, keep: float, **options) -> nn.Module:
    options = {'first': 1, **options}
    return pm_seg.make_compressible(model, keep, **options)


def error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_every_kind(kind: str) -> None:
    """Off it is the dense model, at 1 bit for bit; with less, less alike."""
    model = architectures.build(kind)
    x = architectures.images(model)
    expected = model.forward_features(x)
    whole = compress(model, 1.0)
    assert torch.equal(whole.forward_features(x), expected)
    assert torch.equal(whole(x), model(x))
    errors = []
    for keep in (0.9, 0.5):
        small = compress(model, keep)
        got = small.forward_features(x)
        assert got.shape == expected.shape and got.isfinite().all()
        errors.append(error(got, expected))
        with small.blocks.compressor.disabled():
            assert error(small.forward_features(x), expected) < 1e-5
    assert 0 < errors[0] < errors[1] < 1


@torch.no_grad()
def test_size_aware_attention_is_timms_own(kind: str) -> None:
    """Where all sizes are 1, ours is the unmodified block."""
    model = architectures.build(kind)
    x, _, rope = embed(model, architectures.images(model))
    log_size = x.new_zeros(x.shape[:2])
    for index, block in enumerate(model.blocks):
        own = rope[index] if rope is not None and rope.dim() == 4 else rope
        layer = TimmLayer(block)
        expected = layer(x, None, own)
        assert error(layer(x, log_size, own), expected) < 1e-5
        x = expected


def test_backward_and_another_size(kind: str) -> None:
    """Every weight that learned learns; maps of any size, any layer."""
    model = architectures.build(kind)
    small = compress(model, 0.6)
    small.forward_features(architectures.images(model)).sin().sum().backward()
    for name, parameter in small.blocks.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    x = architectures.images(model, size=10)
    if kind == 'hybrid':  # timm's own set_input_size fails
        return
    for changed in (model, small):
        changed.set_input_size(tuple(x.shape[-2:]))
    assert small.blocks.compressor.shape.grid == (10, 10)
    assert 0.5 < small.blocks.compressor.share <= 0.6
    with torch.no_grad():
        expected = model.forward_intermediates(x, [0, 2], norm=True)
        got = small.forward_intermediates(x, [0, 2], norm=True)
        assert [m.shape for m in got[1]] == [m.shape for m in expected[1]]
        assert torch.equal(got[1][0], expected[1][0]), 'dense so far'
        assert not torch.equal(got[1][1], expected[1][1])
        with small.blocks.compressor.disabled():
            off = small.forward_intermediates(x, [0, 2], norm=True)
    assert error(off[0], expected[0]) < 1e-5
    for a, b in zip(off[1], expected[1]):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize('kind', architectures.TABLES, indirect=True)
@torch.no_grad()
def test_dynamic_sizes_and_features_only(kind: str) -> None:
    options = dict(dynamic_img_size=True, num_classes=0)
    model = architectures.build(kind, **options)
    small = compress(model, 0.5)
    for size in (8, 11):
        x = architectures.images(model, size=size)
        with small.blocks.compressor.disabled():
            assert error(small(x), model(x)) < 1e-5
        assert small(x).shape == model(x).shape
    getter = architectures.build(kind, features_only=True, out_indices=(0, 1))
    small = compress(getter, 0.6)
    x = architectures.images(getter.model)
    assert len(getter.model.blocks) == 2
    with small.model.blocks.compressor.disabled():
        for a, b in zip(small(x), getter(x)):
            assert error(a, b) < 1e-5
    assert [m.shape for m in small(x)] == [m.shape for m in getter(x)]


@pytest.mark.parametrize('kind', architectures.TABLES, indirect=True)
def test_scores_and_calibration(kind: str) -> None:
    """The values of every block are watched, and change nothing."""
    model = architectures.build(kind)
    x, labels = architectures.images(model, 4), torch.arange(4)
    batches = [(x, labels)]
    small = pm_seg.compress_model(
        model, batches, keep=0.7, progress=False, first=1
    )
    assert small.blocks.compressor.calibrated
    paper = pm_seg.compress_model(
        model, batches, keep=0.7, progress=False, type='paper'
    )
    scores = paper.blocks.compressor.scores
    assert (scores > 0).all()
    with torch.no_grad():
        got = paper.forward_features(x)
        assert got.isfinite().all()
        assert error(got, model.forward_features(x)) > 0


@pytest.mark.parametrize('kind', architectures.TABLES, indirect=True)
def test_copies_and_pickles(kind: str) -> None:
    model = architectures.build(kind)
    small = compress(model, 0.6)
    x = architectures.images(model)
    assert isinstance(small, type(model))
    with torch.no_grad():
        expected = small(x)
        assert torch.equal(copy.deepcopy(small)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(small))(x), expected)
        again = compress(architectures.build(kind), 0.9)
        again.load_state_dict(small.state_dict())
        assert torch.equal(again(x), expected)
    small.set_grad_checkpointing()
    gradients = []
    for checkpointed in (True, False):
        small.set_grad_checkpointing(checkpointed)
        small.zero_grad()
        small(x).sum().backward()
        gradients.append(small.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', architectures.TABLES, indirect=True)
@torch.no_grad()
def test_compiles_as_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    model = architectures.build(kind, depth=2, dynamic_img_size=True)
    small = compress(model, 0.7)
    compiled = torch.compile(small, fullgraph=True, backend='aot_eager')
    x = architectures.images(model)
    torch.testing.assert_close(compiled(x), small(x), rtol=1e-3, atol=1e-3)


@needs_exporter
@pytest.mark.parametrize(
    'kind', [slow('dinov2'), slow('dinov3'), 'rope mixed']
)
@torch.no_grad()
def test_exports_to_onnx(kind: str, tmp_path: Path) -> None:
    model = architectures.build(kind, depth=2, num_classes=0)
    small = compress(model, 0.7)
    x, path = architectures.images(model, 1), tmp_path / 'model.onnx'
    export(small, x, path)
    assert compare(small, x, path) < 1e-4


@pytest.mark.parametrize('kind', ['dinov3', 'rope mixed', 'eva02 fused'])
@torch.no_grad()
def test_groups_of_identical_tokens_are_the_dense_result(kind: str) -> None:
    """What every second token repeats, at its position, costs nothing."""
    model = architectures.build(kind)
    x, grid, rope = embed(model, architectures.images(model))
    prefix = model.num_prefix_tokens
    x[:, prefix + 1 :: 2] = x[:, prefix::2]
    rope = rope.clone()
    rope[..., 1::2, :] = rope[..., ::2, :]
    layers = [TimmLayer(block) for block in model.blocks]
    shape = encoder_shape(model.blocks, *geometry(model))
    compressor = make_compressor({}, shape)
    compressor.tokens = lambda grid: [64, 32, 32]
    with compressor.disabled():
        dense = compressor.run(layers, x, grid, extra=rope).last
    assert error(compressor.run(layers, x, grid, extra=rope).last, dense) < (
        1e-5
    )


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('beit_base_patch16_224', 'Beit of timm is not supported, expected'),
        ('vit_relpos_small_patch16_224', 'not supported, expected'),
        ('swin_tiny_patch4_window7_224', 'SwinTransformer of timm is not'),
        ('vit_pwee_patch16_reg1_gap_256', 'choose a model of plain'),
        ('vit_dwee_patch16_reg1_gap_256', 'choose a model of plain'),
    ],
)
def test_what_is_not_supported_says_so(name: str, message: str) -> None:
    import timm

    with pytest.raises(ValueError, match=message) as caught:
        pm_seg.make_compressible(timm.create_model(name, num_classes=2), 0.5)
    assert '\n' not in str(caught.value)


def test_masks_and_single_blocks_are_refused() -> None:
    small = compress(architectures.build('dinov3'), 0.5)
    x = architectures.images(small)
    with pytest.raises(ValueError, match='leave attn_mask'):
        small(x, is_causal=True)
    with pytest.raises(RuntimeError, match='run as a whole'):
        list(small.blocks)
    with pytest.raises(ValueError, match='start from the timm model'):
        compress(small, 0.5)
