"""Sums over groups and their transpose."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_seg.core.segments import (
    image_gather,
    image_sizes,
    image_sum,
    make_segments,
    segment_gather,
    segment_sum,
)


def random_groups(seed: int, tokens: int, groups: int) -> torch.Tensor:
    """0..groups-1 each at least once, some tokens outside."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(-1, groups, (tokens,), generator=generator)
    group[:groups] = torch.arange(groups)
    return group[torch.randperm(tokens, generator=generator)]


@given(st.integers(0, 500), st.integers(1, 30), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_sums_and_gathers(seed: int, tokens: int, prefix: int) -> None:
    groups = max(tokens // 3, 1)
    group = random_groups(seed, tokens, groups)
    segments = make_segments(group, prefix)
    assert segments.num_slots == prefix + groups
    assert sorted(segments.given.tolist()) == list(range(prefix + groups))
    sizes = [size for size, _ in segments.blocks]
    assert sizes == sorted(set(sizes))
    assert segments.slot[:prefix].tolist() == list(range(prefix))
    x = torch.randn(2, prefix + tokens, 3, dtype=torch.float64)
    weight = torch.rand(prefix + tokens, dtype=torch.float64)
    weight[prefix:] *= group >= 0
    out = segment_sum(x, weight, segments)
    back = segment_gather(out, (weight > 0).double(), segments)
    for slot, number in enumerate(segments.given.tolist()):
        if number < prefix:
            members = torch.arange(prefix + tokens) == number
        else:
            members = torch.zeros(prefix + tokens, dtype=torch.bool)
            members[prefix:] = group == number - prefix
        expected = (x * weight[:, None])[:, members].sum(1)
        torch.testing.assert_close(out[:, slot], expected)
        for token in members.nonzero().flatten():
            torch.testing.assert_close(back[:, token], expected)


@pytest.mark.parametrize('seed', range(3))
def test_derivatives(seed: int) -> None:
    group = random_groups(seed, 9, 3)
    segments = make_segments(group, 1)
    weight = torch.rand(10, dtype=torch.float64)
    weight[1:] *= group >= 0
    x = torch.randn(2, 10, 2, dtype=torch.float64, requires_grad=True)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: segment_sum(x, w, segments), (x, weight)
    )
    z = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, w: segment_gather(z, w, segments), (z, weight)
    )


@pytest.mark.parametrize('seed', range(3))
def test_blocks_and_bags_agree(seed: int, monkeypatch) -> None:
    """With one fused kernel and in plain operations, both directions."""
    module = importlib.import_module('pm_seg.core.segments')
    segments = make_segments(random_groups(seed, 50, 12), 2)
    results = []
    for bags in (True, False):
        monkeypatch.setattr(module, '_use_bags', lambda x, bags=bags: bags)
        torch.manual_seed(seed)
        x = torch.randn(3, 52, 8, requires_grad=True)
        weight = torch.rand(52)
        weight[2:] *= segments_live(segments)[2:]
        weight.requires_grad_()
        z = segment_sum(x, weight, segments)
        out = segment_gather(z.sin(), weight, segments)
        out.square().sum().backward()
        results.append((z, out, x.grad, weight.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def segments_live(segments) -> torch.Tensor:
    live = torch.zeros(segments.slot.numel(), dtype=torch.bool)
    live[segments.order] = True
    return live


def test_index_tables_are_bounded() -> None:
    segments = make_segments(random_groups(0, 20, 5), 1)
    weight = torch.rand(21)
    for batch in range(1, 30):
        segment_sum(torch.randn(batch, 21, 2), weight, segments)
    assert len(segments.cache) <= 8


def test_same_with_and_without_gradients() -> None:
    segments = make_segments(random_groups(1, 40, 9), 2)
    x, weight = torch.randn(2, 42, 8), torch.rand(42)
    plain = segment_sum(x, weight, segments)
    tracked = segment_sum(x.requires_grad_(), weight, segments)
    assert torch.equal(plain, tracked)


def test_no_atomic_operations(monkeypatch) -> None:
    """Neither direction scatters: results repeat bit for bit anywhere."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    group = random_groups(3, 20, 6).clamp_min(0)
    segments = make_segments(group, 1)
    x = torch.randn(2, 21, 4, requires_grad=True)
    weight = torch.rand(21, requires_grad=True)
    module = importlib.import_module('pm_seg.core.segments')
    monkeypatch.setattr(module, '_use_bags', lambda x: False)
    with Watch():
        z = segment_sum(x, weight, segments)
        out = segment_gather(z, weight, segments)
        position = segments.slot.expand(2, -1)
        z = image_sum(out, position, segments.num_slots)
        out = image_gather(z, position)
        out.square().sum().backward()
    assert any('index_select' in name for name in seen)
    words = ('index_add', 'scatter', 'index_put', 'index_copy')
    assert not [n for n in seen if any(word in n for word in words)]


@given(st.integers(0, 500), st.integers(1, 4), st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_groups_of_each_image(seed: int, batch: int, tokens: int) -> None:
    """Both ways of summing against loops; some groups stay empty."""
    module = importlib.import_module('pm_seg.core.segments')
    torch.manual_seed(seed)
    count = tokens // 2 + 2
    position = torch.randint(count - 1, (batch, tokens))
    x = torch.randn(batch, tokens, 3, dtype=torch.float64)
    expected = torch.zeros(batch, count, 3, dtype=torch.float64)
    for image in range(batch):
        for token in range(tokens):
            expected[image, position[image, token]] += x[image, token]
    torch.testing.assert_close(image_sum(x, position, count), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, '_use_bags', lambda x: False)
        torch.testing.assert_close(image_sum(x, position, count), expected)
    back = image_gather(expected, position)
    for image in range(batch):
        assert torch.equal(back[image], expected[image, position[image]])
    sizes = image_sizes(x, position, count)
    assert sizes.sum() == batch * tokens and not sizes[:, -1].any()


def test_derivatives_with_groups_of_each_image() -> None:
    torch.manual_seed(0)
    position = torch.randint(4, (2, 9))
    x = torch.randn(2, 9, 2, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda x: image_sum(x, position, 5), (x,))
    assert check(lambda z: image_gather(z, position), (z,))


@pytest.mark.parametrize('bags', [True, False])
def test_sums_keep_their_dtype_under_autocast(bags: bool, monkeypatch) -> None:
    module = importlib.import_module('pm_seg.core.segments')
    monkeypatch.setattr(module, '_use_bags', lambda x: bags)
    torch.manual_seed(0)
    position = torch.randint(3, (2, 2000))
    x = torch.randn(2, 2000, 4, requires_grad=True)
    expected = image_sum(x, position, 3)
    with torch.autocast('cpu', torch.bfloat16):
        out = image_sum(x, position, 3)
        sizes = image_sizes(x, position, 3)
        out.square().sum().backward()
    assert out.dtype == x.grad.dtype == sizes.dtype == torch.float32
    rounding = 1e-4 if bags else 0.3  # of sums of hundreds
    torch.testing.assert_close(out, expected, rtol=0, atol=rounding)
    counts = torch.stack([p.bincount(minlength=3) for p in position])
    assert torch.equal(sizes.squeeze(2), counts.float())


def test_sizes_in_half_precision_are_the_nearest_number() -> None:
    """bf16 counts one by one to 256 only."""
    module = importlib.import_module('pm_seg.core.segments')
    position = torch.zeros(1, 1000, dtype=torch.int64)
    x = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    for bags in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, '_use_bags', lambda x, bags=bags: bags)
            assert image_sizes(x, position, 2).tolist() == [[[1000], [0]]]


def test_compiles_under_autocast() -> None:
    torch._dynamo.reset()
    position = torch.randint(3, (2, 50))
    x = torch.randn(2, 50, 4)
    compiled = torch.compile(
        lambda x: image_sum(x, position, 3), fullgraph=True,
        backend='aot_eager',
    )  # fmt: skip
    with torch.autocast('cpu', torch.bfloat16):
        out = compiled(x)
    assert out.dtype == torch.float32
    expected = image_sum(x, position, 3)
    torch.testing.assert_close(out, expected, atol=0.1, rtol=0)
