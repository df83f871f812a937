"""The blocks of timm's plain Vision Transformers as layers.

timm's own blocks run unmodified as long as every token stands for one patch;
with sizes, their parameters run on size-aware attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .compressible import CompressibleMixin
from .layers import HalvedLayer, attention, mean_keys


class ValueTap:
    """The values of a timm attention, as :class:`ScoreRecorder` taps them.

    timm's modules do not show them. While watched, the attention runs a
    second time, with hooks on the values, (B, heads, T, D), in between.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def register_forward_hook(
        self, hook: Callable[[nn.Module, tuple, Tensor], Tensor]
    ) -> torch.utils.hooks.RemovableHandle:
        """As that of a module whose output are the values."""

        def watch(
            module: nn.Module, args: tuple, kwargs: dict, out: Tensor
        ) -> Tensor:
            tap = partial(hook, module, args)
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

    def attend(self, x: Tensor, *args: Tensor | None) -> Tensor:
        out = attention(self.block.attn, self._before(x, 1), *args)
        return x + self._after(out, 1)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self._after(self.block.mlp(self._before(x, 2)), 2)

    def mean_keys(self, x: Tensor) -> Tensor:
        x, attn = self._before(x, 1), self.block.attn
        if attn.qkv is not None:
            return mean_keys(x, attn.qkv.weight, attn.qkv.bias, attn.num_heads)
        keys = attn.k_proj
        heads = len(keys.weight) // attn.head_dim
        return mean_keys(x, keys.weight, keys.bias, heads, keys_alone=True)

    def _before(self, x: Tensor, half: int) -> Tensor:
        """What attention, half 1, or the MLP, half 2, gets of tokens."""
        return x if self.post_norm else getattr(self.block, f'norm{half}')(x)

    def _after(self, out: Tensor, half: int) -> Tensor:
        """What tokens get of its output, scaled in either of timm's forms."""
        block = self.block
        if self.post_norm:
            out = getattr(block, f'norm{half}')(out)
        elif hasattr(block, f'ls{half}'):
            out = getattr(block, f'ls{half}')(out)
        elif (gamma := getattr(block, f'gamma_{half}')) is not None:
            out = gamma * out
        return getattr(block, f'drop_path{half}')(out)


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
