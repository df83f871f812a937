"""mmpretrain's DeiT III, EVA and EVA-02 with token compression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmpretrain.models.backbones import BEiTViT, DeiT3, ViTEVA02
from mmpretrain.models.backbones.beit import BEiTTransformerEncoderLayer
from mmpretrain.models.backbones.deit3 import DeiT3TransformerEncoderLayer
from mmpretrain.models.backbones.vit_eva02 import EVA02EndcoderLayer
from mmpretrain.models.utils import RotaryEmbeddingFast
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from ...core.merging import Grid
from ..layers import fused_attention, mean_heads, run_halves
from .pretrain_vit import PMPretrainEncoderLayer, PretrainMixin


class _Halves:
    """A stock layer in the two halves compressors call."""

    with_cp = False

    def forward(
        self, x: Tensor, log_size: Tensor | None = None, *extra: Tensor
    ) -> Tensor:
        """Run the layer, see :class:`~pm_seg.core.Layer`."""
        return run_halves(self, x, log_size, *extra)

    def _attention(
        self, x: Tensor, log_size: Tensor | None, rope: Tensor | None = None
    ) -> Tensor:
        """Of ``BEiTAttention`` or ``AttentionWithRoPE``."""
        attn = self.attn
        bias = attn.qkv.bias
        if hasattr(attn, 'q_bias'):
            zero = torch.zeros_like(attn.v_bias)
            bias = torch.cat([attn.q_bias, zero, attn.v_bias])
        out = fused_attention(
            F.linear(x, attn.qkv.weight, bias),
            attn.num_heads,
            attn.value_tap,
            log_size,
            attn.attn_drop.p if self.training else 0.0,
            None if rope is None else lambda part: _rotate(part, rope),
        )
        return attn.proj_drop(attn.proj(out))

    def _mean_keys(self, x: Tensor) -> Tensor:
        qkv = self.attn.qkv
        bias = qkv.bias if qkv.bias is None else qkv.bias.chunk(3)[1]
        return mean_heads(x, qkv.weight.chunk(3)[1], bias, self.attn.num_heads)


class PMDeiT3Layer(_Halves, DeiT3TransformerEncoderLayer):
    """See :class:`~pm_seg.core.Layer`. ``ln1`` serves both halves, as in
    the stock layer."""

    attend = PMPretrainEncoderLayer.attend
    mean_keys = PMPretrainEncoderLayer.mean_keys

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.ln1(x), identity=x)


class PMBEiTLayer(_Halves, BEiTTransformerEncoderLayer):
    """See :class:`~pm_seg.core.Layer`."""

    def attend(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        out = self._attention(self.ln1(x), log_size)
        return x + self.drop_path(_scaled(self.gamma_1, out))

    def feed_forward(self, x: Tensor) -> Tensor:
        out = self.ffn(self.ln2(x))
        return x + self.drop_path(_scaled(self.gamma_2, out))

    def mean_keys(self, x: Tensor) -> Tensor:
        return self._mean_keys(self.ln1(x))


class PMEVA02Layer(_Halves, EVA02EndcoderLayer):
    """See :class:`~pm_seg.core.Layer`; it takes rotary tables."""

    def attend(
        self, x: Tensor, log_size: Tensor | None, rope: Tensor
    ) -> Tensor:
        out = self._attention(self.norm1(x), log_size, rope)
        return x + self.drop_path(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def mean_keys(self, x: Tensor) -> Tensor:
        return self._mean_keys(self.norm1(x))


def _scaled(gamma: Tensor | None, out: Tensor) -> Tensor:
    return out if gamma is None else gamma * out


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the patch tokens of (B, heads, P+T, D), channels in pairs."""
    first, rest = x.tensor_split([x.shape[2] - rope.shape[-2]], dim=2)
    sin, cos = rope.chunk(2, dim=-1)
    a, b = rest.unflatten(3, (-1, 2)).unbind(4)
    turned = torch.stack([-b, a], dim=4).flatten(3)
    return torch.cat([first, (rest * cos + turned * sin).type_as(x)], 2)


class _Variant(PretrainMixin):
    """A backbone of mmpretrain whose layers are run by a compressor.

    Takes all arguments of the stock class, has the same checkpoint keys and,
    with ``compression=None``, gives the same results; attention is fused.
    Loading is strict, as that of
    :class:`~pm_seg.models.backbones.pretrain_vit.PMVisionTransformer`.

    Args:
        *args, **kwargs: Those of the stock class.
        compression (dict, optional): As of ``PMVisionTransformer``.

    Raises:
        ValueError: On relative position biases, or unknown ``compression``.
    """

    layer_class: type[nn.Module]

    def __init__(
        self, *args, compression: dict | None = None, **kwargs
    ) -> None:
        super().__init__(*args, **kwargs)
        self.adopt(compression)

    def adopt(self, compression: dict | None) -> None:
        """Make what the stock class built run compressed."""
        if getattr(self, 'rel_pos_bias', None) is not None or getattr(
            self, 'use_rel_pos_bias', False
        ):
            raise ValueError(
                f'{type(self).__name__} cannot merge tokens under a relative '
                'position bias, which is of pairs of positions; use a model '
                'with use_rel_pos_bias=False and use_shared_rel_pos_bias='
                'False, as EVA-L and EVA-g are'
            )
        for layer in self.layers:
            layer.__class__ = self.layer_class
            layer.attn.value_tap = nn.Identity()
        grid = tuple(self.patch_resolution)
        rope = self.rotary_table(grid)
        extra = () if rope is None else (rope.shape[1],)
        self.build_compressor(compression, grid, self.num_extra_tokens, *extra)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, (height, width) = self.patch_embed(images)
        grid, after = (int(height), int(width)), isinstance(self, DeiT3)
        if after:
            x = self.drop_after_pos(x + self._resized_positions(grid, 0))
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        if not after:
            if self.pos_embed is not None:
                x = x + self._resized_positions(grid, self.num_extra_tokens)
            x = self.drop_after_pos(x)
        return getattr(self, 'pre_norm', nn.Identity())(x), grid

    def rotary_table(self, grid: Grid) -> Tensor | None:
        rope = getattr(self, 'rope', None)
        if rope is None:
            return None
        if grid != tuple(self.patch_resolution):
            dims, device = 2 * rope.half_dim, rope.freqs_cos.device
            rope = RotaryEmbeddingFast(dims, grid, rope.theta).to(device)
        return torch.cat([rope.freqs_sin, rope.freqs_cos], dim=1)


@MODELS.register_module()
class PMDeiT3(_Variant, DeiT3):
    """mmpretrain's ``DeiT3``, see :class:`_Variant`."""

    layer_class = PMDeiT3Layer


@MODELS.register_module()
class PMBEiTViT(_Variant, BEiTViT):
    """mmpretrain's ``BEiTViT`` without relative position bias: EVA."""

    layer_class = PMBEiTLayer


@MODELS.register_module()
class PMViTEVA02(_Variant, ViTEVA02):
    """mmpretrain's ``ViTEVA02``, see :class:`_Variant`."""

    layer_class = PMEVA02Layer


#: pm_seg's class for each stock one.
VARIANTS = {DeiT3: PMDeiT3, BEiTViT: PMBEiTViT, ViTEVA02: PMViTEVA02}
