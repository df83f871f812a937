"""Attention that counts a token as often as the patches it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pm_seg.models.layers import (
    attention_with_channels,
    attention_with_mask,
    fused_attention,
    mean_keys,
    size_aware_attention,
)

WAYS = [attention_with_mask, attention_with_channels]


def inputs(dims: int = 12, tokens: int = 9, dtype=torch.float64):
    q, k, v = torch.randn(3, 2, 3, tokens, dims, dtype=dtype)
    return q, k, v, torch.randint(1, 9, (2, tokens)).to(dtype)


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('dims', [12, 16, 64, 69])
def test_a_size_is_that_many_copies_of_a_token(way, dims: int) -> None:
    q, k, v, size = inputs(dims)
    found = way(q, k, v, size.log(), 0.0)
    for image in range(2):
        count = size[image].long()
        many = [t[image].repeat_interleave(count, 1) for t in (k, v)]
        logits = q[image] @ many[0].mT * dims**-0.5
        expected = logits.softmax(-1) @ many[1]
        torch.testing.assert_close(found[image], expected)


@pytest.mark.parametrize('way', WAYS)
def test_gradients(way) -> None:
    q, k, v, size = inputs(4, 5)
    leaves = [t.requires_grad_() for t in (q, k, v, size.log())]
    assert torch.autograd.gradcheck(lambda *t: way(*t, 0.0), leaves)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_channels_are_as_exact_as_half_precision_allows(dtype) -> None:
    """A size in a single channel would be rounded to 8 or 11 bits."""
    q, k, v, size = inputs(64, 50, dtype)
    exact = [t.float() for t in (q, k, v)]
    log_size = (size.float() * 50).log()
    expected = attention_with_mask(*exact, log_size, 0.0)
    error = {
        way: (way(q, k, v, log_size, 0.0).float() - expected).abs().mean()
        for way in WAYS
    }
    assert error[attention_with_channels] < 1.2 * error[attention_with_mask]


def test_without_sizes_it_is_plain_attention() -> None:
    q, k, v, size = inputs()
    plain = size_aware_attention(q, k, v)
    expected = (q @ k.mT * 12**-0.5).softmax(-1) @ v
    torch.testing.assert_close(plain, expected)
    alone = size_aware_attention(q, k, v, torch.zeros_like(size))
    torch.testing.assert_close(alone, expected)


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors run the form of accelerators, of the same shape."""
    seen = []

    def watch(*args, attn_mask: Tensor | None = None, **kwargs) -> Tensor:
        seen.append(attn_mask)
        return args[2]

    monkeypatch.setattr(
        torch.nn.functional, 'scaled_dot_product_attention', watch
    )
    for device in ('cpu', 'meta'):
        q, k, v, size = (t.to(device) for t in inputs())
        assert size_aware_attention(q, k, v, size.log()).shape == q.shape
    assert seen[0].shape == (2, 1, 9, 9) and seen[1] is None


def test_attention_of_all_heads() -> None:
    qkv, log_size = torch.randn(2, 7, 3 * 12), torch.rand(2, 7)
    tap = torch.nn.Identity()
    values = []
    tap.register_forward_hook(lambda m, args, out: values.append(out))
    found = fused_attention(qkv, 3, tap, log_size)
    q, k, v = (t.unflatten(2, (3, 4)).transpose(1, 2) for t in qkv.chunk(3, 2))
    assert torch.equal(values[0], v)
    logits = q @ k.mT * 0.5 + log_size[:, None, None]
    expected = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('bias', [False, True])
def test_mean_keys_are_the_mean_of_the_heads(bias: bool) -> None:
    linear = torch.nn.Linear(12, 36, bias=bias)
    x = torch.randn(2, 5, 12)
    key = linear(x).chunk(3, -1)[1]
    expected = key.unflatten(2, (3, 4)).mean(2)
    found = mean_keys(x, linear.weight, linear.bias, 3)
    torch.testing.assert_close(found, expected)
