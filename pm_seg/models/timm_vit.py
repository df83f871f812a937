"""timm's Vision Transformers with token compression."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from torch import Tensor, nn

from ..core.structure import Grid
from .compressible import CompressibleMixin


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


class CompressedBlocks(CompressibleMixin, nn.Module):
    """The blocks of a timm Vision Transformer, run through a compressor.

    Takes the place of ``model.blocks``; the blocks keep their names, so that
    timm's checkpoints load. Blocks run as a whole: what takes single blocks
    (``forward_intermediates``, attention masks) raises ``RuntimeError``.

    Args:
        blocks (nn.Sequential): The model's own blocks.
        grid (tuple[int, int]): Patch rows and columns.
        num_prefix (int): Class, register and distillation tokens.
        compression (dict): Options of :class:`pm_seg.core.TokenCompressor`.
    """

    own_keys = ('compressor.',)
    default_compression = {'adapt': 0}  # as the classifiers of mmpretrain

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
    def layers(self) -> list[nn.Module]:
        """The blocks."""
        return [self.get_submodule(str(i)) for i in range(self.depth)]

    @property
    def score_taps(self) -> list[QkvTap]:
        """See :class:`QkvTap`."""
        return [QkvTap(layer.attn) for layer in self.layers]

    def forward(self, x: Tensor) -> Tensor:
        """Run all blocks on tokens of the native grid, (B, P+N, C)."""
        return self.run_layers(x, self.compressor.grid)[0]

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
            'are model.blocks.layers'
        )


def compress_timm_blocks(model: nn.Module, compression: dict) -> None:
    """Let a timm Vision Transformer run its blocks compressed, in place.

    Args:
        model (timm.models.VisionTransformer): Or a subclass, as DeiT's.
        compression (dict): Options of :class:`pm_seg.core.TokenCompressor`.

    Raises:
        ValueError: If the model does something that compression does not
            know, or an option is wrong.
    """
    problem = _problem(model, compression)
    if problem:
        raise ValueError(f'{type(model).__name__}: {problem}')
    model.blocks = CompressedBlocks(
        model.blocks,
        tuple(model.patch_embed.grid_size),
        model.num_prefix_tokens,
        compression,
    )


def _problem(model: nn.Module, compression: dict) -> str | None:
    """What stands against compressing this model, None if nothing."""
    if isinstance(model.blocks, CompressedBlocks):
        return 'is compressible already; start from the timm model'
    kind = compression.get('type', 'prune_merge')
    if kind != 'prune_merge':
        return (
            f"type={kind!r} works between a block's attention and its MLP, "
            "which timm's blocks do not offer; use type='prune_merge', with "
            "builder='matching' for groups by similarity"
        )
    attentions = [getattr(block, 'attn', None) for block in model.blocks]
    parts = ('qkv', 'num_heads', 'head_dim')
    if not all(hasattr(attn, part) for attn in attentions for part in parts):
        return (
            "needs blocks with timm's Attention (one qkv layer), got "
            f'{type(model.blocks[0]).__name__}'
        )
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
