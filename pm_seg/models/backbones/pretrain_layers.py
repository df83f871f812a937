"""mmpretrain's layers in the two halves that compressors call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmpretrain.models.backbones.beit import BEiTTransformerEncoderLayer
from mmpretrain.models.backbones.deit3 import DeiT3TransformerEncoderLayer
from mmpretrain.models.backbones.vision_transformer import (
    TransformerEncoderLayer,
)
from mmpretrain.models.backbones.vit_eva02 import EVA02EndcoderLayer
from torch import Tensor, nn

from ..layers import HalvedLayer, fused_attention


def attention(
    attn: nn.Module,
    x: Tensor,
    log_size: Tensor | None,
    rope: Tensor | None = None,
) -> Tensor:
    """Of any kind of mmpretrain, (B, P+N, C), after the output projection.

    Args:
        attn (nn.Module): ``MultiheadAttention``, ``BEiTAttention`` or
            ``AttentionWithRoPE``.
        x (Tensor): Normed tokens, (B, P+N, C).
        log_size (Tensor, optional): See
            :func:`~pm_seg.models.layers.fused_attention`.
        rope (Tensor, optional): Sines and cosines of the patch tokens,
            (N, 2D), or of each image, (B, 1, N, 2D).
    """
    if hasattr(attn, 'q_bias'):
        zero = torch.zeros_like(attn.v_bias)
        bias = torch.cat([attn.q_bias, zero, attn.v_bias])
        qkv = F.linear(x, attn.qkv.weight, bias)
    else:
        qkv = attn.qkv(x)
    rate = getattr(attn.attn_drop, 'p', attn.attn_drop)
    out = fused_attention(
        qkv,
        attn.num_heads,
        attn.value_tap,
        log_size,
        rate if attn.training else 0.0,
        None if rope is None else lambda part: _rotate(part, rope),
    )
    return attn.proj_drop(attn.proj(out))


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the patch tokens of (B, heads, P+N, D), channels in pairs."""
    first, rest = x.tensor_split([x.shape[2] - rope.shape[-2]], dim=2)
    sin, cos = rope.chunk(2, dim=-1)
    a, b = rest.unflatten(3, (-1, 2)).unbind(4)
    turned = torch.stack([-b, a], dim=4).flatten(3)
    return torch.cat([first, (rest * cos + turned * sin).type_as(x)], 2)


class _FusedLayer(HalvedLayer):
    """Of ``VisionTransformer`` and ``DeiT3``."""

    def attend(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        out = self.attn.gamma1(attention(self.attn, self.norm1(x), log_size))
        return x + self.attn.out_drop(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm2(x), identity=x)


class PMPretrainEncoderLayer(_FusedLayer, TransformerEncoderLayer):
    """Of ``VisionTransformer``."""


class PMDeiT3Layer(_FusedLayer, DeiT3TransformerEncoderLayer):
    """Of ``DeiT3``, where ``ln1`` serves both halves."""

    @property
    def norm1(self) -> nn.Module:
        return self.ln1

    norm2 = norm1


class PMBEiTLayer(HalvedLayer, BEiTTransformerEncoderLayer):
    """Of ``BEiTViT``."""

    def attend(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        out = attention(self.attn, self.norm1(x), log_size)
        return x + self.drop_path(_scaled(self.gamma_1, out))

    def feed_forward(self, x: Tensor) -> Tensor:
        out = self.ffn(self.norm2(x))
        return x + self.drop_path(_scaled(self.gamma_2, out))


class PMEVA02Layer(HalvedLayer, EVA02EndcoderLayer):
    """Of ``ViTEVA02``; it takes rotary tables."""

    def attend(
        self, x: Tensor, log_size: Tensor | None, rope: Tensor
    ) -> Tensor:
        out = attention(self.attn, self.norm1(x), log_size, rope)
        return x + self.drop_path(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _scaled(gamma: Tensor | None, out: Tensor) -> Tensor:
    return out if gamma is None else gamma * out
