"""Transformer layers: the stock parameters on fused attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from mmcv.cnn.bricks.drop import DropPath
from mmcv.cnn.bricks.transformer import FFN
from mmseg.models.backbones.vit import TransformerEncoderLayer
from torch import Tensor, nn

from ..core import EncoderShape, LayerCost
from ..core.merging import Grid


def fused_attention(
    qkv: Tensor,
    num_heads: int,
    value_tap: nn.Module,
    log_size: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of all heads from (B, T, 3 C), before the last projection.

    The values (B, heads, T, D) pass through ``value_tap``.
    """
    batch, tokens, _ = qkv.shape
    qkv = qkv.view(batch, tokens, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, D)
    out = size_aware_attention(q, k, value_tap(v), log_size, dropout)
    return out.transpose(1, 2).flatten(2)


def attention(
    attn: nn.Module,
    x: Tensor,
    log_size: Tensor | None = None,
    rope: Tensor | None = None,
    tap: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention of any kind of mmpretrain and timm.

    Of normed tokens, (B, P+T, C) as the result. ``rope`` are sines and
    cosines of the patch tokens, (T, 2D), (heads, T, 2D) or one more dimension
    for the images. The values (B, heads, P+T, D) pass through ``value_tap``
    of the attention if it has one, else ``tap``.
    """
    if attn.qkv is None:
        parts = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    elif getattr(attn, 'q_bias', None) is None:
        parts = attn.qkv(x).chunk(3, dim=2)
    else:
        zero = torch.zeros_like(attn.q_bias)
        bias = torch.cat([attn.q_bias, zero, attn.v_bias])
        parts = F.linear(x, attn.qkv.weight, bias).chunk(3, dim=2)
    dims = parts[0].shape[2] // attn.num_heads
    q, k, v = (part.unflatten(2, (-1, dims)).transpose(1, 2) for part in parts)
    if hasattr(attn, 'q_norm'):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        half = getattr(attn, 'rotate_half', False)
        q, k = (_rotate(part, rope, half).type_as(v) for part in (q, k))
    tap = getattr(attn, 'value_tap', tap)
    v = v if tap is None else tap(v)
    if len(q[0]) > len(k[0]):  # several heads share keys and values
        shared = len(q[0]) // len(k[0])
        k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
    drop = attn.attn_drop
    rate = getattr(drop, 'p', drop) if attn.training else 0.0
    out = size_aware_attention(q, k, v, log_size, rate)
    out = out.transpose(1, 2).flatten(2)
    if hasattr(attn, 'norm'):
        out = attn.norm(out)
    if getattr(attn, 'gate', None) is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


def _rotate(x: Tensor, rope: Tensor, half: bool) -> Tensor:
    """Rotate the patch tokens of (B, heads, P+T, D).

    Pairs are of neighbouring channels, or of one from each ``half``.
    """
    first, rest = x.tensor_split([x.shape[2] - rope.shape[-2]], dim=2)
    sin, cos = rope.chunk(2, dim=-1)
    if half:
        a, b = rest.chunk(2, dim=3)
        turned = torch.cat([-b, a], dim=3)
    else:
        a, b = rest.unflatten(3, (-1, 2)).unbind(4)
        turned = torch.stack([-b, a], dim=4).flatten(3)
    return torch.cat([first, rest * cos + turned * sin], dim=2)


def size_aware_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_size: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``F.scaled_dot_product_attention`` that knows what tokens stand for.

    Args:
        q, k, v (Tensor): (B, heads, T, D), as the result.
        log_size (Tensor, optional): (B, T), added to the logits of each key:
            it counts as often as the patches it stands for.
        dropout (float): Rate on the attention weights. Defaults to 0.
    """
    if log_size is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    # A mask costs nothing on a CPU. On accelerators it rules out the fastest
    # kernels; channels do not.
    if q.device.type == 'cpu':
        return attention_with_mask(q, k, v, log_size, dropout)
    return attention_with_channels(q, k, v, log_size, dropout)


def attention_with_mask(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor, dropout: float
) -> Tensor:
    """:func:`size_aware_attention` by a mask."""
    mask = log_size.to(q.dtype)[:, None, None]
    mask = mask.expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout
    )


def attention_with_channels(
    q: Tensor, k: Tensor, v: Tensor, log_size: Tensor, dropout: float
) -> Tensor:
    """:func:`size_aware_attention` by more channels, exactly::

        [q, 1, 1, 0...] [k, a, b, 0...]^T = q k^T + a + b

    with ``a + b = log_size sqrt(D)``, split in two so that half precision
    rounds the second part only, and zeros up to a multiple of 8 channels.
    """
    dims = q.shape[3]
    scale = dims**-0.5
    bias = (log_size / scale)[:, None, :, None].expand(*k.shape[:3], 1)
    first = bias.to(k.dtype)
    rest = (bias - first).to(k.dtype)
    spare = -(dims + 2) % 8
    q = torch.cat(
        [F.pad(q, (0, 2), value=1.0), q.new_zeros(*q.shape[:3], spare)], 3
    )
    k = torch.cat([k, first, rest, k.new_zeros(*k.shape[:3], spare)], 3)
    v = F.pad(v, (0, 2 + spare))
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, scale=scale
    )
    return out[..., :dims]


def mean_keys(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    keys_alone: bool = False,
) -> Tensor:
    """Keys averaged over the heads, by one projection to a head's channels.

    Of normed tokens (B, T, C), by the weight (3 C, C) and bias (3 C,) of
    queries, keys and values, or of ``keys_alone``; (B, T, D).
    """
    parts = [weight] if bias is None else [weight, bias]
    if not keys_alone:
        parts = [part.chunk(3)[1] for part in parts]
    parts = [part.unflatten(0, (num_heads, -1)).mean(0) for part in parts]
    return F.linear(x, *parts)


class PlainFFN(FFN):
    """mmcv's feed-forward network without a wrapper around ``forward``.

    The wrapper renames a deprecated argument; ``torch.compile`` of torch 2.4
    cannot trace it.
    """

    forward = inspect.unwrap(FFN.forward)


class HalvedLayer:
    """A stock layer as :class:`~pm_seg.core.Layer`.

    Mixed into the class of mmseg or mmpretrain, which builds it. Attention
    has a submodule ``value_tap``, an identity for forward hooks on the
    values, such as :class:`~pm_seg.core.ScoreRecorder`.
    """

    #: Whether to compute activations again in the backward pass.
    with_cp = False

    @classmethod
    def adopt(cls, layer: nn.Module) -> None:
        """Make a stock layer one of these in place, or ``ValueError``."""
        stock = cls.__bases__[-1]
        if type(layer) is not stock:
            raise ValueError(
                f'a layer is of type {type(layer).__name__}, expected '
                f'{stock.__name__}; merge adapters into the weights first'
            )
        layer.__class__ = cls
        layer.attn.value_tap = nn.Identity()
        for part in layer.modules():
            if isinstance(part, DropPath):  # of numpy: not to be compiled
                part.drop_prob = float(part.drop_prob)

    def forward(
        self, x: Tensor, log_size: Tensor | None = None, *extra: Tensor
    ) -> Tensor:
        args = (x, log_size, *extra)
        if self.with_cp and torch.is_grad_enabled():
            # Non-reentrant, so that it also works behind frozen layers.
            return cp.checkpoint(self.compute, *args, use_reentrant=False)
        return self.compute(*args)

    def compute(self, x: Tensor, *args: Tensor | None) -> Tensor:
        """Both halves."""
        return self.feed_forward(self.attend(x, *args))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm2(x), identity=x)

    def mean_keys(self, x: Tensor) -> Tensor:
        qkv, heads = self.attn.qkv, self.attn.num_heads
        return mean_keys(self.norm1(x), qkv.weight, qkv.bias, heads)


class PMTransformerEncoderLayer(HalvedLayer, TransformerEncoderLayer):
    """mmseg's encoder layer on fused attention."""

    @classmethod
    def adopt(cls, layer: nn.Module) -> None:
        super().adopt(layer)
        layer.ffn.__class__ = PlainFFN

    def attend(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        outer, attn = self.attn, self.attn.attn
        out = fused_attention(
            F.linear(self.norm1(x), attn.in_proj_weight, attn.in_proj_bias),
            attn.num_heads,
            outer.value_tap,
            log_size,
            attn.dropout if self.training else 0.0,
        )
        out = outer.proj_drop(attn.out_proj(out))
        return x + outer.dropout_layer(out)

    def mean_keys(self, x: Tensor) -> Tensor:
        x, attn = self.norm1(x), self.attn.attn
        weight, bias = attn.in_proj_weight, attn.in_proj_bias
        return mean_keys(x, weight, bias, attn.num_heads)


def encoder_shape(
    layers: Sequence[nn.Module],
    grid: Grid,
    num_prefix: int,
    extra_dims: int = 0,
) -> EncoderShape:
    """Sizes and costs of a transformer of like layers.

    Each has its attention in ``attn``. Every weight matrix counts once per
    token, attention by its two products.
    """
    attn, depth = layers[0].attn, len(layers)
    if hasattr(attn, 'embed_dims'):
        dims = attn.embed_dims
        key_dims = dims // attn.num_heads
    else:  # timm
        dims, key_dims = attn.proj.out_features, attn.head_dim
    inside = sum(_matrices(layer.attn) for layer in layers)
    cost = LayerCost(
        inside / depth,
        (sum(map(_matrices, layers)) - inside) / depth,
        2 * key_dims * attn.num_heads,
    )
    return EncoderShape(
        depth, grid, num_prefix, dims, key_dims, cost, extra_dims
    )


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)
