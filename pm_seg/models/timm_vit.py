"""timm's Vision Transformers with token compression."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..core import CLASSIFICATION
from ..core.merging import Grid
from .compressible import CompressibleMixin
from .layers import mean_keys, size_aware_attention


class QkvTap:
    """The values of a timm attention, as :class:`ScoreRecorder` taps them.

    timm computes queries, keys and values in one linear layer. Hooks see and
    may replace the values alone, (B, heads, T, D).

    Args:
        attention (nn.Module): With ``qkv``, ``num_heads`` and ``head_dim``.
    """

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def register_forward_hook(
        self, hook: Callable[[nn.Module, tuple, Tensor], Tensor | None]
    ) -> torch.utils.hooks.RemovableHandle:
        """As that of a module whose output are the values."""
        heads = (self.attention.num_heads, self.attention.head_dim)

        def watch(module: nn.Module, args: tuple, qkv: Tensor) -> Tensor:
            q, k, v = qkv.chunk(3, dim=-1)
            value = v.unflatten(-1, heads).transpose(1, 2)
            watched = hook(module, args, value)
            if watched is not None:
                v = watched.transpose(1, 2).flatten(2)
            return torch.cat([q, k, v], dim=-1)

        return self.attention.qkv.register_forward_hook(watch)


class TimmLayer:
    """A timm ``Block`` as :class:`~pm_seg.core.Layer`; parameters stay there.

    Args:
        block (nn.Module): With timm's ``Attention``.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        if log_size is None:
            return self.block(x)
        return self.feed_forward(self.attend(x, log_size))

    def attend(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        block, attn = self.block, self.block.attn
        heads = (3, attn.num_heads, attn.head_dim)
        qkv = attn.qkv(block.norm1(x)).unflatten(2, heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, T, D)
        rate = attn.attn_drop.p if attn.training else 0.0
        out = size_aware_attention(
            attn.q_norm(q), attn.k_norm(k), v, log_size, rate
        )
        out = attn.norm(out.transpose(1, 2).flatten(2))
        out = attn.proj_drop(attn.proj(out))
        return x + block.drop_path1(block.ls1(out))

    def feed_forward(self, x: Tensor) -> Tensor:
        block = self.block
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def mean_keys(self, x: Tensor) -> Tensor:
        attn = self.block.attn
        return mean_keys(
            self.block.norm1(x), attn.qkv.weight, attn.qkv.bias, attn.num_heads
        )


class CompressedBlocks(CompressibleMixin, nn.Module):
    """The blocks of a timm Vision Transformer, run through a compressor.

    Takes the place of ``model.blocks``; the blocks keep their names, so that
    timm's checkpoints load. Blocks run as a whole: what takes single blocks
    (``forward_intermediates``, attention masks) raises ``RuntimeError``.

    Args:
        blocks (nn.Sequential): The model's own blocks.
        grid (tuple[int, int]): Patch rows and columns.
        num_prefix (int): Class, register and distillation tokens.
        compression (dict): See :func:`pm_seg.core.make_compressor`.
    """

    own_keys = ('compressor.',)
    default_compression = CLASSIFICATION

    def __init__(
        self,
        blocks: nn.Sequential,
        grid: Grid,
        num_prefix: int,
        compression: dict,
    ) -> None:
        super().__init__()
        self.depth = len(blocks)
        for index, block in enumerate(blocks):
            self.add_module(str(index), block)
        self.build_compressor(compression, grid, num_prefix)

    @property
    def blocks(self) -> list[nn.Module]:
        """timm's blocks."""
        return [self.get_submodule(str(i)) for i in range(self.depth)]

    @property
    def layers(self) -> list[TimmLayer]:
        """The blocks as a compressor calls them."""
        return [TimmLayer(block) for block in self.blocks]

    @property
    def score_taps(self) -> list[QkvTap]:
        """See :class:`QkvTap`."""
        return [QkvTap(block.attn) for block in self.blocks]

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks on tokens of the native grid, (B, P+N, C)."""
        return self.run_layers(x, self.compressor.shape.grid).last

    def __len__(self) -> int:
        return self.depth

    def __iter__(self) -> Iterator[nn.Module]:
        self._refuse()

    def __getitem__(self, index: int) -> nn.Module:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            'compressed blocks run as a whole: forward, forward_features and '
            'forward_head work, single blocks (forward_intermediates, '
            'attn_mask, grad checkpointing) do not. The blocks themselves '
            'are model.blocks.blocks'
        )


def compress_timm_blocks(model: nn.Module, compression: dict) -> None:
    """Let a timm Vision Transformer run its blocks compressed, in place.

    Args:
        model (timm.models.VisionTransformer): Or a subclass, as DeiT's.
        compression (dict): See :func:`pm_seg.core.make_compressor`.

    Raises:
        ValueError: If the model does something that compression does not
            know, or an option is wrong.
    """
    problem = _problem(model)
    if problem:
        raise ValueError(f'{type(model).__name__}: {problem}')
    model.blocks = CompressedBlocks(
        model.blocks,
        tuple(model.patch_embed.grid_size),
        model.num_prefix_tokens,
        compression,
    )


def _problem(model: nn.Module) -> str | None:
    """What stands against compressing this model, None if nothing."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    if isinstance(model.blocks, CompressedBlocks):
        return 'is compressible already; start from the timm model'
    for block in model.blocks:
        if type(block) is not Block or type(block.attn) is not Attention:
            return (
                "needs timm's Block with its Attention, got "
                f'{type(block).__name__} with '
                f'{type(getattr(block, "attn", None)).__name__}'
            )
        if getattr(block.attn, 'gate', None) is not None:
            return 'gated attention is not known here'
    if getattr(model, 'dynamic_img_size', False):
        return (
            'dynamic_img_size=True does not tell the blocks their grid; '
            'create the model with dynamic_img_size=False and the img_size '
            'you need'
        )
    if not isinstance(getattr(model, 'patch_drop', None), nn.Identity):
        return 'patch_drop_rate takes tokens off the grid; set it to 0'
    if model.grad_checkpointing:
        return 'call set_grad_checkpointing(False) before compressing'
    return None
