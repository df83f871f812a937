"""The blocks of timm's plain Vision Transformers as layers.

timm's own blocks run unmodified as long as every token stands for one patch;
with sizes, their parameters run on size-aware attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compressible import CompressibleMixin
from .layers import HalvedLayer, mean_heads, mean_keys, size_aware_attention


def attention(
    attn: nn.Module,
    x: Tensor,
    log_size: Tensor | None = None,
    rope: Tensor | None = None,
    tap: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """timm's ``Attention``, ``EvaAttention`` or ``AttentionRope``.

    Args:
        attn (nn.Module): Whose parameters are used.
        x (Tensor): Normed tokens, (B, P+T, C), as the result.
        log_size (Tensor, optional): See
            :func:`~pm_seg.models.layers.size_aware_attention`.
        rope (Tensor, optional): Sines and cosines of the patch tokens,
            (T, 2D), (heads, T, 2D) or one more dimension for the images.
        tap (Callable, optional): The values (B, heads, T, D) pass through it.
    """
    q, k, v = (
        part.unflatten(2, (-1, attn.head_dim)).transpose(1, 2)
        for part in _project(attn, x)
    )
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = (_rotate(attn, part, rope).type_as(v) for part in (q, k))
    v = v if tap is None else tap(v)
    if len(q[0]) > len(k[0]):  # several heads share keys and values
        shared = len(q[0]) // len(k[0])
        k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
    rate = attn.attn_drop.p if attn.training else 0.0
    out = size_aware_attention(q, k, v, log_size, rate)
    out = attn.norm(out.transpose(1, 2).flatten(2))
    if getattr(attn, 'gate', None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _project(attn: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values of all heads, (B, T, heads * D) each."""
    if attn.qkv is None:
        return [part(x) for part in (attn.q_proj, attn.k_proj, attn.v_proj)]
    if getattr(attn, 'q_bias', None) is None:
        return attn.qkv(x).chunk(3, dim=2)
    bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return F.linear(x, attn.qkv.weight, bias).chunk(3, dim=2)


def _rotate(attn: nn.Module, x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the patch tokens of (B, heads, P+T, D)."""
    from timm.layers import apply_rot_embed_cat

    first, rest = x.tensor_split([attn.num_prefix_tokens], dim=2)
    half = getattr(attn, 'rotate_half', False)
    return torch.cat([first, apply_rot_embed_cat(rest, rope, half=half)], 2)


class ValueTap:
    """The values of a timm attention, as :class:`ScoreRecorder` taps them.

    timm's modules do not show them. While watched, the attention runs a
    second time, with hooks on the values, (B, heads, T, D), in between.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def register_forward_hook(
        self, hook: Callable[[nn.Module, tuple, Tensor], Tensor | None]
    ) -> torch.utils.hooks.RemovableHandle:
        """As that of a module whose output are the values."""

        def watch(
            module: nn.Module, args: tuple, kwargs: dict, out: Tensor
        ) -> Tensor:
            def tap(value: Tensor) -> Tensor:
                watched = hook(module, args, value)
                return value if watched is None else watched

            return attention(module, args[0], None, kwargs.get('rope'), tap)

        return self.attention.register_forward_hook(watch, with_kwargs=True)


class TimmLayer(HalvedLayer):
    """A ``Block``, ``EvaBlock`` or ``EvaBlockPostNorm`` of a timm model."""

    def __init__(self, block: nn.Module, with_cp: bool = False) -> None:
        self.block = block
        self.with_cp = with_cp
        self.post_norm = type(block).__name__ == 'EvaBlockPostNorm'

    __call__ = HalvedLayer.forward

    def compute(
        self, x: Tensor, log_size: Tensor | None, rope: Tensor | None = None
    ) -> Tensor:
        """Both halves, timm's own block where no token has a size."""
        if log_size is not None:
            return self.feed_forward(self.attend(x, log_size, rope))
        return self.block(x) if rope is None else self.block(x, rope=rope)

    def attend(
        self,
        x: Tensor,
        log_size: Tensor | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        block = self.block
        out = attention(block.attn, self._normed(x), log_size, rope)
        out = block.norm1(out) if self.post_norm else self._scaled(out, 1)
        return x + block.drop_path1(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        block = self.block
        if self.post_norm:
            out = block.norm2(block.mlp(x))
        else:
            out = self._scaled(block.mlp(block.norm2(x)), 2)
        return x + block.drop_path2(out)

    def mean_keys(self, x: Tensor) -> Tensor:
        attn, x = self.block.attn, self._normed(x)
        if attn.qkv is not None:
            return mean_keys(x, attn.qkv.weight, attn.qkv.bias, attn.num_heads)
        key = attn.k_proj
        heads = len(key.weight) // attn.head_dim
        return mean_heads(x, key.weight, key.bias, heads)

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.post_norm else self.block.norm1(x)

    def _scaled(self, out: Tensor, half: int) -> Tensor:
        """With the layer scale of a half, in either of timm's forms."""
        scale = getattr(self.block, f'ls{half}', None)
        if scale is not None:
            return scale(out)
        gamma = getattr(self.block, f'gamma_{half}')
        return out if gamma is None else gamma * out


class TimmLayers(CompressibleMixin):
    """For modules with the ``blocks`` of a timm model."""

    with_cp = False

    @property
    def layers(self) -> list[TimmLayer]:
        """The blocks as a compressor calls them."""
        return [TimmLayer(block, self.with_cp) for block in self.blocks]

    @property
    def score_taps(self) -> list[ValueTap]:
        return [ValueTap(block.attn) for block in self.blocks]
