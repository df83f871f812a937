"""The score identity and its accumulation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pm_seg.core import ScoreRecorder, value_gradient_scores


class TinyAttention(nn.Module):
    """Self-attention with a tap, in explicit or fused form."""

    def __init__(self, dims: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dims, 3 * dims)
        self.value_tap = nn.Identity()
        self.attention: torch.Tensor | None = None

    def forward(self, x, explicit: bool = False):
        batch, tokens, dims = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        v = self.value_tap(v)
        if explicit:
            scale = q.shape[-1] ** -0.5
            self.attention = (q @ k.transpose(-1, -2) * scale).softmax(-1)
            self.attention.retain_grad()
            out = self.attention @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return x + out.transpose(1, 2).reshape(batch, tokens, dims)


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TinyAttention() for _ in range(3))

    @property
    def taps(self) -> list[nn.Module]:
        return [layer.value_tap for layer in self.layers]

    def forward(self, x, explicit: bool = False):
        for layer in self.layers:
            x = layer(x, explicit)
        return x


def per_image_loss(out: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(-1, 2, out[0].numel(), dtype=out.dtype)
    return (out.flatten(1).sin() * weight).sum(1)


def test_identity_against_attention_gradients() -> None:
    """<v, dL/dv> = sum_q A * dL/dA, to 1e-6 in float64."""
    net = TinyNet().double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    values = []
    for tap in net.taps:
        tap.register_forward_hook(
            lambda m, a, v: (v.retain_grad(), values.append(v))[0]
        )
    per_image_loss(net(x, explicit=True)).mean().backward()
    for layer, value in zip(net.layers, values):
        attention = layer.attention
        explicit = (attention * attention.grad).sum(dim=(1, 2))
        score = value_gradient_scores(value, value.grad)
        torch.testing.assert_close(score, explicit, rtol=1e-6, atol=1e-12)


def record(net, batches, reduction='image', prefix=1) -> torch.Tensor:
    tokens = batches[0].shape[1] - prefix
    with ScoreRecorder(net.taps, tokens, prefix, reduction) as recorder:
        for batch in batches:
            per_image_loss(net(batch)).mean().backward()
    return recorder.scores()


def test_release_reduction() -> None:
    """'batch' is |sum over batch, heads, queries| / (B H T), per batch."""
    net = TinyNet().double()
    x = torch.randn(4, 7, 12, dtype=torch.float64)
    got = record(net, [x], 'batch')
    net(x, explicit=True)
    per_image_loss(net(x, explicit=True)).mean().backward()
    for row, layer in zip(got, net.layers):
        a = layer.attention
        want = (a * a.grad).sum(dim=(0, 1, 2)).abs()[1:] / (4 * 3 * 7)
        torch.testing.assert_close(row, want.float())


def test_independent_of_batch_split() -> None:
    net = TinyNet().double()
    x = torch.randn(8, 7, 12, dtype=torch.float64)
    whole = record(net, [x])
    for size in (1, 2, 4):
        torch.testing.assert_close(
            record(net, list(x.split(size))), whole, rtol=1e-6, atol=0
        )


def test_frozen_network_scores_the_same() -> None:
    net = TinyNet()
    x = torch.randn(2, 7, 12)
    free = record(net, [x])
    net.requires_grad_(False)
    torch.testing.assert_close(record(net, [x]), free)
    assert all(p.grad is not None for p in net.parameters())


def test_no_hooks_left_and_no_gradient() -> None:
    net = TinyNet()
    x = torch.randn(2, 7, 12)
    with ScoreRecorder(net.taps, 6, 1) as recorder, torch.no_grad():
        net(x)
    assert not any(tap._forward_hooks for tap in net.taps)
    with pytest.raises(RuntimeError, match=r'layers \[0, 1, 2\]'):
        recorder.scores()


def test_errors() -> None:
    net = TinyNet()
    with pytest.raises(ValueError, match="reduction='sum' must be one of"):
        ScoreRecorder(net.taps, 6, 1, 'sum')
    with (
        ScoreRecorder(net.taps, 9, 1),
        pytest.raises(ValueError, match='got 6 patch tokens, expected 9'),
    ):
        net(torch.randn(2, 7, 12))
