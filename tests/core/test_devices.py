"""All kinds of compression on accelerators that are not there."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from devices import OnDevice, SimulatedDevice, fake_cuda, move
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from toy import KINDS, make, make_layers, shape_of

from pm_seg.core import GroupRecorder, make_compressor
from pm_seg.core.compressor import Compressor

GRID = (12, 12)
HALVES = [torch.bfloat16, torch.float16]
FOUND_FROM_IMAGES = [kind for kind in KINDS if kind != 'paper']


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def ready(kind: str, **options) -> tuple[nn.ModuleList, Compressor]:
    return make({**KINDS[kind], **options}, shape_of(grid=GRID))


def put(compressor: Compressor, layers: nn.Module, device: str, dtype=None):
    """Move both; maps by position, which hang on values, by hand."""
    if compressor.needs_scores:
        maps = compressor.token_maps(GRID)
        moved = [_fields_to(token_map, device) for token_map in maps]
        compressor.token_maps = lambda grid: moved
        compressor._apply = lambda *args, **kwargs: compressor
    move(compressor, device, dtype)
    move(layers, device, dtype)


def _fields_to(value, device: str):
    if not is_dataclass(value):
        return value
    changes = {
        field.name: getattr(value, field.name).detach().to(device)
        for field in fields(value)
        if isinstance(getattr(value, field.name), Tensor)
    }
    return replace(value, **changes)


# ----------------------------------------------------------- without numbers


@pytest.mark.parametrize('dtype', [torch.float32, *HALVES])
def test_every_type_of_numbers_stays_what_it_is(kind: str, dtype) -> None:
    layers, compressor = ready(kind)
    with fake_cuda():
        put(compressor, layers, 'cuda', dtype)
        x = torch.empty(2, 145, 24, device='cuda', dtype=dtype)
        out = compressor.run(layers, x, GRID, (1,))
        for found in (out.last, out.layers[1]):
            assert found.device.type == 'cuda' and found.dtype == dtype
            assert found.shape == x.shape
        if out.groups is not None:
            assert out.groups.place.device.type == 'cuda'
            assert out.groups.mean(x[:, 1:]).dtype == dtype


@pytest.mark.parametrize('dtype', HALVES)
def test_autocast_leaves_the_tokens_in_full_precision(
    kind: str, dtype
) -> None:
    """Products are in half precision, similarities are not."""
    layers, compressor = ready(kind)
    with fake_cuda(autocast=dtype):
        put(compressor, layers, 'cuda')
        x = torch.empty(2, 145, 24, device='cuda')
        assert layers[0].mlp(x).dtype == dtype, 'autocast is on'
        assert compressor.run(layers, x, GRID).last.dtype == torch.float32


@pytest.mark.parametrize('kind', FOUND_FROM_IMAGES)
@pytest.mark.parametrize('default', [False, True])
def test_built_straight_on_the_device(kind: str, default: bool) -> None:
    """By ``with torch.device`` or ``torch.set_default_device``."""
    with fake_cuda():
        if default:
            torch.set_default_device('cuda')
        try:
            with torch.device('cuda'):
                layers, compressor = ready(kind)
        finally:
            torch.set_default_device(None)
        for tensor in (*compressor.parameters(), *compressor.buffers()):
            assert tensor.device.type == 'cuda'
        x = torch.empty(1, 145, 24, device='cuda')
        compressor.run(layers, x, GRID)
    _, expected = ready(kind)
    assert compressor.loads() == expected.loads()


def test_backward_without_numbers(kind: str) -> None:
    layers, compressor = ready(kind)
    put(compressor, layers, 'meta')
    x = torch.empty(2, 145, 24, device='meta', requires_grad=True)
    compressor.run(layers, x, GRID).last.sum().backward()
    assert x.grad.shape == x.shape and x.grad.is_meta
    for parameter in layers.parameters():
        assert parameter.grad is not None


@pytest.mark.parametrize('batch', [1, 4])
def test_products_are_of_aligned_sizes(batch: int) -> None:
    """Rows that are contracted or lie next to each other come in eights, of
    similarities in fours: products on accelerators need 16 bytes.
    """
    layers, compressor = make(
        dict(keep=0.5), shape_of(12, (32, 32), dims=64, heads=4)
    )
    seen = []

    def watch(name):
        def count(a, b, *args, out_shape=None, **kwargs) -> int:
            seen.append((name, a, b))
            return 0

        return count

    aten = torch.ops.aten
    with fake_cuda():
        put(compressor, layers, 'cuda')
        # What merges is compared after the layers; attention has its own.
        counter = FlopCounterMode(
            display=False,
            custom_mapping={aten.bmm: watch('bmm'), aten.mm: watch('mm')},
        )
        x = torch.empty(batch, 1025, 64, device='cuda')
        with counter:
            compressor.run(_Nothing(layers), x, (32, 32))
    left = [1024, *compressor.tokens((32, 32))]
    assert len(seen) == sum(a > b for a, b in zip(left, left[1:])) > 3
    for _, a, b in seen:
        assert a[-1] % 8 == 0 and b[-1] % 4 == 0


class _Nothing(list):
    """Layers that change nothing."""

    def __init__(self, layers) -> None:
        super().__init__((lambda x, log_size=None: x) for _ in layers)


# -------------------------------------------------------------- with numbers


def test_the_simulation_notices_what_it_should() -> None:
    with SimulatedDevice() as device:
        x = torch.arange(4, device=device.device)
        assert isinstance(x, OnDevice) and x.device == device.device
        y = (x + 1) * 2
        assert not device.waits
        with pytest.raises(RuntimeError, match='and on the CPU'):
            y + torch.ones(4)
        for wait in (
            lambda: y.sum().item(),
            lambda: y.tolist(),
            lambda: bool(y.any()),
            lambda: y.nonzero(),
            lambda: y[y > 2],
            lambda: y.cpu(),
            lambda: torch.tensor([1, 2], device=device.device),
        ):
            device.waits.clear()
            wait()
            assert device.waits
        assert y.cpu().tolist() == [2, 4, 6, 8]


@pytest.mark.parametrize('prefix', [0, 1])
@torch.no_grad()
def test_nothing_waits_and_groups_are_those_of_the_cpu(
    kind: str, prefix: int
) -> None:
    shape = shape_of(grid=GRID, num_prefix=prefix)
    layers, compressor = make(KINDS[kind], shape)
    if kind == 'pm':
        known = torch.randn(4, 24), torch.randn(4, 24, 24)
        compressor.learn(*known)
        compressor.set_strength(0.1)
    x = torch.randn(2, prefix + 144, 24)
    with GroupRecorder(compressor) as recorder:
        expected = compressor.run(layers, x, GRID).last
    wanted, loads = recorder.groups, compressor.loads()
    with SimulatedDevice() as device:
        move(compressor, device.device)
        move(layers, device.device)
        x = x.to(device.device)
        device.waits.clear()
        found = compressor.run(layers, x, GRID).last
        assert not device.waits
        with GroupRecorder(compressor) as recorder:
            compressor.run(layers, x, GRID)
        assert compressor.loads() == loads
        groups = [group.tolist() for group in recorder.groups]
        torch.testing.assert_close(found.cpu(), expected)
    assert groups == [group.tolist() for group in wanted]


@torch.no_grad()
def test_loaded_into_a_model_on_the_device(kind: str) -> None:
    """Of another budget, from a checkpoint on the CPU."""
    layers, saved = make(KINDS[kind])
    saved.settle()
    x = torch.randn(2, 25, 24)
    expected = saved.run(layers, x, (4, 6)).last
    state = copy.deepcopy(saved.state_dict())
    name = 'keep_rate' if kind == 'paper' else 'keep'
    options = {**KINDS[kind], name: 0.8}
    with SimulatedDevice() as device:
        with torch.device(device.device):
            other = make_compressor(options, shape_of())
        for tensor in (*other.parameters(), *other.buffers()):
            assert tensor.device == device.device
        other.load_state_dict(state)
        assert other.loads() == saved.loads() and other.compressed
        layers = move(make_layers(shape_of()), device.device)
        x = x.to(device.device)
        device.waits.clear()
        found = other.run(layers, x, (4, 6)).last
        assert not device.waits
        torch.testing.assert_close(found.cpu(), expected)
