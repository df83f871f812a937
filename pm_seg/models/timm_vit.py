"""timm's plain Vision Transformers with token compression.

``VisionTransformer`` (ViT, DeiT, DINOv2, SigLIP, CLIP) and ``Eva`` (DINOv3,
EVA-02, ``rope_*``, Perception Encoder), with rotary position tables or
without.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

from torch import Tensor, nn

from ..core import CLASSIFICATION, Outputs
from ..core.compressor import check_option
from ..core.merging import Grid
from .timm_layers import TimmLayers

SUPPORTED = (
    "timm's VisionTransformer (ViT, DeiT, DINOv2, SigLIP, CLIP) or Eva "
    '(DINOv3, EVA-02, rope_*)'
)


class CompressedBlocks(TimmLayers, nn.Module):
    """The blocks of a timm Vision Transformer and their compressor.

    Takes the place of ``model.blocks``; the blocks keep their names, so that
    timm's checkpoints load. What would run single blocks gets a
    ``RuntimeError``.
    """

    own_keys = ('compressor.',)
    default_compression = CLASSIFICATION

    def __init__(self, model: nn.Module, compression: dict) -> None:
        super().__init__()
        self.depth = len(model.blocks)
        for index, block in enumerate(model.blocks):
            self.add_module(str(index), block)
        self.geometry = geometry(model)
        self.with_cp = model.grad_checkpointing
        self.build_compressor(compression)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.children())[: self.depth]

    def __len__(self) -> int:
        return self.depth

    def forward(self, *args, **kwargs) -> NoReturn:
        raise RuntimeError(
            'compressed blocks run as a whole, from the model '
            '(forward_features, forward_intermediates), not one by one; '
            'the blocks themselves are model.blocks.blocks'
        )

    __getitem__ = __iter__ = forward


class CompressedMixin:
    """What runs a timm model's blocks as a whole instead of one by one.

    Mixed into the class of a model, as ``torch.nn.utils.parametrize`` and
    ``fully_shard`` do: everything else stays timm's, names included.
    """

    def _run(
        self,
        images: Tensor,
        outputs: Sequence[int] = (),
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> tuple[Outputs, Grid]:
        if attn_mask is not None or is_causal:
            raise ValueError(
                'attention masks are of single tokens, and here tokens are '
                'merged; leave attn_mask and is_causal out'
            )
        x, grid, rope = embed(self, images)
        return self.blocks.run_layers(x, grid, outputs, rope), grid

    def forward_features(self, x: Tensor, *args, **kwargs) -> Tensor:
        """As timm's, (B, 3, H, W) -> (B, P+N, C)."""
        return self.norm(self._run(x, (), *args, **kwargs)[0].last)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As timm's; ``stop_early`` makes no difference."""
        from timm.models._features import feature_take_indices

        check_option('output_fmt', output_fmt, ('NCHW', 'NLC'))
        taken, _ = feature_take_indices(len(self.blocks), indices)
        found, grid = self._run(x, taken, attn_mask, is_causal)
        count, outs = self.num_prefix_tokens, found.layers.values()
        outs = [self.norm(out) if norm else out for out in outs]
        prefix = [out[:, :count] for out in outs]
        maps = [out[:, count:] for out in outs]
        if output_fmt == 'NCHW':
            maps = [out.mT.unflatten(2, grid).contiguous() for out in maps]
        with_prefix = return_prefix_tokens and count > 0
        if output_dict:
            outputs = dict(image_intermediates=maps)
            if with_prefix:
                outputs['image_intermediates_prefix'] = prefix
            if not intermediates_only:
                outputs['image_features'] = self.norm(found.last)
            return outputs
        maps = list(zip(maps, prefix)) if with_prefix else maps
        return maps if intermediates_only else (self.norm(found.last), maps)

    def set_input_size(self, *args, **kwargs) -> None:
        """As timm's."""
        super().set_input_size(*args, **kwargs)
        self.blocks.compressor.set_grid(tuple(self.patch_embed.grid_size))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's."""
        super().set_grad_checkpointing(enable)
        self.blocks.with_cp = enable

    def __reduce__(self) -> tuple:
        return _blank, (type(self).__mro__[2],), self.__dict__


@cache
def _compressed_class(kind: type) -> type:
    name = f'Compressed{kind.__name__}'
    return type(name, (CompressedMixin, kind), {'__module__': __name__})


def _blank(kind: type) -> nn.Module:
    kind = _compressed_class(kind)
    return kind.__new__(kind)


def embed(
    model: nn.Module, images: Tensor
) -> tuple[Tensor, Grid, Tensor | None]:
    """What the blocks of a timm model get for images (B, 3, H, W).

    Tokens (B, P+N, C), the grid (h, w), and the rotary position tables,
    (N, 2D) or (L, heads, N, 2D), None if there are none.
    """
    size = tuple(int(length) for length in images.shape[-2:])
    grid = model.patch_embed.dynamic_feat_size(size)
    x, rope = model._pos_embed(model.patch_embed(images)), None
    if isinstance(x, tuple):
        x, rope = x
    return model.norm_pre(x), grid, rope


def geometry(model: nn.Module) -> tuple[Grid, int, int]:
    """``CompressibleMixin.geometry`` of a timm model."""
    grid, extra_dims = tuple(model.patch_embed.grid_size), 0
    if getattr(model, 'rope', None) is not None:
        rope = model.rope.get_embed(shape=grid)
        extra_dims = rope.numel() // rope.shape[-2]
    return grid, model.num_prefix_tokens, extra_dims


def find_timm_vit(model: nn.Module) -> nn.Module | None:
    """The Vision Transformer that a timm model is, or takes features from.

    None if it is not timm's; ``ValueError`` if of another architecture.
    """
    timm = sys.modules.get('timm')
    if timm is None:
        return None
    getter = type(model).__name__ == 'FeatureGetterNet'
    vit = model.model if getter else model
    if isinstance(vit, (timm.models.VisionTransformer, timm.models.Eva)):
        return vit
    if not type(model).__module__.startswith('timm.'):
        return None
    raise ValueError(
        f'{type(vit).__name__} of timm is not supported, expected {SUPPORTED}:'
        ' windows, pooling between layers and relative position biases need '
        'the whole grid of tokens'
    )


def compress_timm_vit(model: nn.Module, compression: dict) -> None:
    """Let what :func:`find_timm_vit` finds run compressed, in place.

    Or ``ValueError`` if its parts are of an unknown kind.
    """
    check_timm_vit(model)
    blocks = CompressedBlocks(model, compression)
    model.blocks = blocks.to(next(model.parameters()))
    model.__class__ = _compressed_class(type(model))


def check_timm_vit(model: nn.Module) -> None:
    """Raise ``ValueError`` if something stands against compressing it."""
    from timm.layers import Attention, AttentionRope
    from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
    from timm.models.vision_transformer import Block

    name = type(model).__name__
    if isinstance(model.blocks, CompressedBlocks):
        raise ValueError(
            f'{name} is compressible already; start from the timm model'
        )
    blocks = Block, EvaBlock, EvaBlockPostNorm
    attentions = Attention, EvaAttention, AttentionRope
    for block in model.blocks:
        attn = getattr(block, 'attn', None)
        if type(block) not in blocks or type(attn) not in attentions:
            raise ValueError(
                f"{name}: needs timm's Block with its Attention, or EvaBlock, "
                f'got {type(block).__name__} with {type(attn).__name__}; '
                'choose a model of plain sequential blocks'
            )
    if getattr(getattr(model, 'patch_drop', None), 'prob', 0):
        raise ValueError(
            f'{name}: patch_drop_rate takes tokens off the grid; set it to 0'
        )
