"""What every kind of compression promises, on a transformer of plain torch."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from toy import KINDS, make, shape_of

from pm_seg.core import PRESETS, GroupRecorder, run_dense

GRIDS = [(4, 6), (1, 1), (1, 7), (5, 3), (9, 8)]
#: Options with which nothing is compressed.
WHOLE = {
    **{kind: dict(options, keep=1.0) for kind, options in KINDS.items()},
    'paper': dict(type='paper', keep_rate=1.0),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def tokens(
    grid: tuple[int, int] = (4, 6), batch: int = 2, prefix: int = 1
) -> torch.Tensor:
    return torch.randn(batch, prefix + grid[0] * grid[1], 24)


def test_all_kinds_are_tested() -> None:
    assert set(KINDS) == set(WHOLE) == set(PRESETS)


@pytest.mark.parametrize('prefix', [0, 1, 2])
@pytest.mark.parametrize('grid', GRIDS)
@torch.no_grad()
def test_any_grid_and_any_batch(kind: str, grid, prefix: int) -> None:
    """Full maps at every level; what is asked for changes nothing."""
    layers, compressor = make(KINDS[kind], shape_of(num_prefix=prefix))
    x = tokens(grid, 3, prefix)
    whole = compressor.run(layers, x, grid, outputs=(0, 2, 3))
    assert whole.layers.keys() == {0, 2, 3}
    for out in (whole.last, *whole.layers.values()):
        assert out.shape == x.shape and out.isfinite().all()
    assert torch.equal(whole.layers[3], whole.last)
    assert not torch.equal(whole.layers[2], whole.last)
    assert torch.equal(compressor.run(layers, x, grid).last, whole.last)
    for image in range(3):
        one = compressor.run(layers, x[image : image + 1], grid).last
        torch.testing.assert_close(
            one, whole.last[image : image + 1], rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_layers_run_on_as_few_tokens_as_it_says(kind: str) -> None:
    shape = shape_of(num_prefix=2)
    layers, compressor = make(KINDS[kind], shape)
    attended, kept = [], []
    for layer in layers:
        layer.project.register_forward_hook(
            lambda m, args, out: attended.append(out.shape[1] - 2)
        )
        layer.mlp.register_forward_hook(
            lambda m, args, out: kept.append(out.shape[1] - 2)
        )
    compressor.run(layers, tokens(prefix=2), shape.grid)
    loads = compressor.loads()
    assert attended == [load.attended for load in loads]
    assert kept == [load.kept for load in loads]
    assert min(kept) < shape.num_tokens
    assert compressor.share == pytest.approx(
        sum(load.macs for load in loads) / shape.dense_macs
    )
    assert compressor.share < 0.9


@torch.no_grad()
def test_uncompressed_is_the_dense_model_bit_for_bit(kind: str) -> None:
    layers, whole = make(WHOLE[kind])
    x = tokens()
    expected = run_dense(layers, x, (1,))
    found = whole.run(layers, x, (4, 6), (1,))
    assert torch.equal(found.last, expected.last)
    assert torch.equal(found.layers[1], expected.layers[1])
    assert found.groups is None and whole.share == 1
    _, compressor = make(KINDS[kind])
    assert not torch.equal(
        compressor.run(layers, x, (4, 6)).last, expected.last
    )
    with compressor.disabled():
        assert torch.equal(
            compressor.run(layers, x, (4, 6)).last, expected.last
        )


@pytest.mark.parametrize('grid', [(4, 6), (5, 7)])
def test_every_parameter_learns(kind: str, grid) -> None:
    """Those of the compressor too: processes that train together need it."""
    layers, compressor = make(KINDS[kind])
    x = tokens(grid).requires_grad_()
    out = compressor.run(layers, x, grid, outputs=(1,))
    (out.last.sin() + out.layers[1].cos()).sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any(2).all()
    trained = {
        name: parameter
        for module in (layers, compressor)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_compiles_as_one_graph(kind: str) -> None:
    """Forward and backward, once for all images of a size."""
    torch._dynamo.reset()
    layers, compressor = make(KINDS[kind], shape_of(depth=3))
    grid = (5, 7)

    def run(x: torch.Tensor) -> torch.Tensor:
        return compressor.run(layers, x, grid, (1,)).last

    compiled = torch.compile(run, fullgraph=True, backend='aot_eager')
    x = tokens(grid)
    outputs, gradients = [], []
    for function in (run, compiled):
        layers.zero_grad()
        compressor.zero_grad()
        outputs.append(function(x))
        outputs[-1].sin().sum().backward()
        parameters = [*layers.parameters(), *compressor.parameters()]
        gradients.append([p.grad for p in parameters if p.requires_grad])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if hasattr(torch.compiler, 'set_stance'):  # torch >= 2.6
        with torch.compiler.set_stance('fail_on_recompile'):
            compiled(tokens(grid))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_state_dict_is_all_there_is(kind: str, dtype) -> None:
    """On every grid, also after a cast to half precision."""
    layers, compressor = make(KINDS[kind])
    for parameter in compressor.parameters():
        parameter += 0.1 * torch.rand_like(parameter)
    compressor.settle()
    loads = compressor.loads()
    layers, compressor = layers.to(dtype), compressor.to(dtype)
    assert compressor.loads() == loads
    file = io.BytesIO()
    torch.save(compressor.state_dict(), file)
    file.seek(0)
    changed = {
        'keep_rate' if kind == 'paper' else 'keep': 0.8,
        **{k: v for k, v in KINDS[kind].items() if k == 'type'},
    }
    _, other = make(changed, seed=1)
    other.to(dtype)
    assert other.loads() != loads
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.loads() == loads and other.compressed
    for grid in GRIDS:
        x = tokens(grid).to(dtype)
        expected = compressor.run(layers, x, grid).last
        assert expected.dtype == dtype and expected.isfinite().all()
        assert torch.equal(other.run(layers, x, grid).last, expected)
        copied = copy.deepcopy(other).run(layers, x, grid).last
        assert torch.equal(copied, expected)


@torch.no_grad()
def test_a_recorder_sees_the_groups_of_every_layer(kind: str) -> None:
    layers, compressor = make(KINDS[kind])
    x = tokens()
    with GroupRecorder(compressor) as recorder:
        compressor.run(layers, x, (4, 6))
    assert compressor.observer is None and recorder.grid == (4, 6)
    assert len(recorder.groups) == 4
    for groups, load in zip(recorder.groups, compressor.loads()):
        assert groups.shape in [(1, 24), (2, 24)]
        for row in groups:
            known = row[row >= 0].unique()
            assert torch.equal(known, torch.arange(load.kept))
            assert (row < 0).sum() == load.pruned
    with compressor.disabled(), GroupRecorder(compressor) as recorder:
        compressor.run(layers, x, (4, 6))
    assert recorder.groups == [] and recorder.grid is None


def test_tokens_have_to_be_of_the_grid(kind: str) -> None:
    layers, compressor = make(KINDS[kind])
    message = 'got 25 tokens, expected 31: 1 prefix tokens and a 5x6 grid'
    with pytest.raises(ValueError, match=message):
        compressor.run(layers, tokens(), (5, 6))
