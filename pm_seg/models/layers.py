"""Transformer layers: the stock parameters on fused attention."""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention
from mmseg.models.backbones.vit import TransformerEncoderLayer
from torch import Tensor, nn


def fused_attention(
    qkv: Tensor,
    num_heads: int,
    value_tap: nn.Module,
    key_bias: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Multi-head self-attention on ``F.scaled_dot_product_attention``.

    Args:
        qkv (Tensor): Queries, keys and values of all heads, (B, T, 3 C).
        num_heads (int): Heads, each of D = C / heads channels.
        value_tap (nn.Module): The values (B, heads, T, D) pass through it.
        key_bias (Tensor, optional): Added to the attention logits of each
            key, (B, 1, 1, T).
        dropout (float): Rate on the attention weights. Defaults to 0.

    Returns:
        tuple[Tensor, Tensor]: (B, T, C) before the output projection, and
        the keys (B, heads, T, D).
    """
    batch, tokens, _ = qkv.shape
    qkv = qkv.view(batch, tokens, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, D)
    if key_bias is not None:
        key_bias = key_bias.to(q.dtype).expand(-1, -1, tokens, -1)
    out = F.scaled_dot_product_attention(
        q, k, value_tap(v), attn_mask=key_bias, dropout_p=dropout
    )
    return out.transpose(1, 2).flatten(2), k


class FusedMultiheadAttention(MultiheadAttention):
    """mmcv's self-attention on ``F.scaled_dot_product_attention``.

    Arguments, parameters and checkpoint keys are those of the base class;
    only self-attention without masks or positional terms is supported, which
    is all a Vision Transformer uses. The values pass through the submodule
    ``value_tap``, an identity for forward hooks such as
    :class:`~pm_seg.core.ScoreRecorder`.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.value_tap = nn.Identity()

    def forward(self, query: Tensor, identity: Tensor) -> Tensor:
        """Self-attention plus identity.

        Args:
            query (Tensor): (B, T, C).
            identity (Tensor): (B, T, C).

        Returns:
            Tensor: (B, T, C).
        """
        return self.attend(query, identity)[0]

    def attend(
        self, query: Tensor, identity: Tensor, key_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`forward`, returning the keys too.

        Args:
            query, identity (Tensor): (B, T, C).
            key_bias (Tensor, optional): Added to the attention logits of
                each key, (B, 1, 1, T).

        Returns:
            tuple[Tensor, Tensor]: (B, T, C) and the keys (B, heads, T, D).
        """
        attn = self.attn
        out, keys = fused_attention(
            F.linear(query, attn.in_proj_weight, attn.in_proj_bias),
            attn.num_heads,
            self.value_tap,
            key_bias,
            attn.dropout if self.training else 0.0,
        )
        out = attn.out_proj(out)
        return identity + self.dropout_layer(self.proj_drop(out)), keys


class PlainFFN(FFN):
    """mmcv's feed-forward network without a wrapper around ``forward``.

    The wrapper renames a deprecated argument; ``torch.compile`` of torch 2.4
    cannot trace it.
    """

    forward = inspect.unwrap(FFN.forward)


class PMTransformerEncoderLayer(TransformerEncoderLayer):
    """mmseg's encoder layer on fused attention.

    Activation checkpointing (``with_cp``) is non-reentrant, so that it also
    works behind frozen layers.
    """

    def __init__(self, *args, **kwargs) -> None:
        # The base class updates these dicts in place, its own defaults too.
        kwargs.setdefault('attn_cfg', {})
        kwargs.setdefault('ffn_cfg', {})
        super().__init__(*args, **kwargs)

    def build_attn(self, attn_cfg: dict) -> None:
        self.attn = FusedMultiheadAttention(**attn_cfg)

    def build_ffn(self, ffn_cfg: dict) -> None:
        self.ffn = PlainFFN(**ffn_cfg)

    def attend(
        self, x: Tensor, key_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The first half, see :meth:`FusedMultiheadAttention.attend`."""
        return self.attn.attend(self.norm1(x), x, key_bias)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half, (B, T, C)."""
        return self.ffn(self.norm2(x), identity=x)

    def _block(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.attn(self.norm1(x), identity=x))

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on tokens (B, T, C)."""
        if self.with_cp and torch.is_grad_enabled():
            return cp.checkpoint(self._block, x, use_reentrant=False)
        return self._block(x)


def token_dims(layer: nn.Module) -> int:
    """C, channels of the tokens an encoder layer works on."""
    attention = layer.attn
    if hasattr(attention, 'embed_dims'):
        return attention.embed_dims
    return attention.qkv.in_features  # timm


def layer_cost(layer: nn.Module) -> tuple[int, int]:
    """Multiply-accumulates of an encoder layer.

    Every weight matrix once per token, and the two products of attention.

    Returns:
        tuple[int, int]: a and b of ``a T + b T^2`` on T tokens.
    """
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    return weights, 2 * token_dims(layer)


def append_layers(
    layers: nn.ModuleList, num_layers: int, drop_path_rate: float, **kwargs
) -> None:
    """Append encoder layers whose drop-path rate grows linearly with depth.

    Args:
        layers (nn.ModuleList): Appended to.
        num_layers (int): Number of layers.
        drop_path_rate (float): Rate of the last layer.
        **kwargs: Arguments of :class:`PMTransformerEncoderLayer`.
    """
    for rate in torch.linspace(0, drop_path_rate, num_layers).tolist():
        layers.append(PMTransformerEncoderLayer(drop_path_rate=rate, **kwargs))
