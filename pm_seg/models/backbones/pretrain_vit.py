"""mmpretrain's Vision Transformers with token compression."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from mmengine.logging import print_log
from mmpretrain.models.backbones import beit, deit, deit3, vit_eva02
from mmpretrain.models.backbones import vision_transformer as vit
from mmpretrain.models.utils import RotaryEmbeddingFast, resize_pos_embed
from mmpretrain.registry import MODELS
from torch import Tensor

from ...core import CLASSIFICATION
from ...core.merging import Grid
from ..compressible import StockBackbone, check_patches
from ..layers import HalvedLayer, attention
from ..loading import State


class PMPretrainEncoderLayer(HalvedLayer, vit.TransformerEncoderLayer):
    """Layer of ``VisionTransformer``."""

    def attend(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        out = self.attn.gamma1(attention(self.attn, self.norm1(x), log_size))
        return x + self.attn.out_drop(out)


class PMDeiT3Layer(HalvedLayer, deit3.DeiT3TransformerEncoderLayer):
    """Layer of ``DeiT3``, where ``ln1`` serves both halves."""

    norm1 = norm2 = property(lambda layer: layer.ln1)
    attend = PMPretrainEncoderLayer.attend


class PMBEiTLayer(HalvedLayer, beit.BEiTTransformerEncoderLayer):
    """Layer of ``BEiTViT``."""

    def attend(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        out = attention(self.attn, self.norm1(x), log_size)
        return x + self.drop_path(_scaled(self.gamma_1, out))

    def feed_forward(self, x: Tensor) -> Tensor:
        out = self.ffn(self.norm2(x))
        return x + self.drop_path(_scaled(self.gamma_2, out))


def _scaled(gamma: Tensor | None, out: Tensor) -> Tensor:
    return out if gamma is None else gamma * out


class PMEVA02Layer(HalvedLayer, vit_eva02.EVA02EndcoderLayer):
    """Layer of ``ViTEVA02``; it takes a rotary table."""

    def attend(
        self, x: Tensor, log_size: Tensor | None, rope: Tensor
    ) -> Tensor:
        out = attention(self.attn, self.norm1(x), log_size, rope)
        return x + self.drop_path(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PretrainBackbone(StockBackbone):
    """For backbones of mmpretrain: from images to what they return."""

    layer_class = PMPretrainEncoderLayer
    default_compression = CLASSIFICATION
    own_keys = (*StockBackbone.own_keys, 'dist_token')

    #: Whether prefix tokens have positions, or come after them.
    prefix_has_positions = True

    def __init__(
        self, *args, layer_cfgs: dict | Sequence[dict] | None = None, **kwargs
    ) -> None:
        with_cp = False
        if not isinstance(layer_cfgs, Sequence):
            layer_cfgs = dict(layer_cfgs or {})
            with_cp = layer_cfgs.pop('with_cp', False)
        super().__init__(*args, layer_cfgs=layer_cfgs, **kwargs)
        for layer in self.layers:
            layer.with_cp = with_cp

    @property
    def reads_prefix(self) -> bool:
        return self.out_type == 'cls_token'

    @property
    def geometry(self) -> tuple[Grid, int, int]:
        grid = tuple(self.patch_resolution)
        rope = self.rotary_table(grid)
        extra_dims = 0 if rope is None else rope.shape[1]
        return grid, self.num_extra_tokens, extra_dims

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Images (B, 3, H, W) to tokens (B, P+N, C), and the grid of N."""
        check_patches(
            images.shape[2:], self.patch_embed.projection.kernel_size
        )
        x, (height, width) = self.patch_embed(images)
        grid = int(height), int(width)
        prefix = (self.cls_token, getattr(self, 'dist_token', None))
        prefix = [t.expand(len(x), -1, -1) for t in prefix if t is not None]
        early = self.prefix_has_positions
        if early:
            x = torch.cat([*prefix, x], dim=1)
        if self.pos_embed is not None:
            x = x + resize_pos_embed(
                self.pos_embed,
                self.patch_resolution,
                grid,
                mode=self.interpolate_mode,
                num_extra_tokens=self.num_extra_tokens if early else 0,
            )
        x = self.drop_after_pos(x)
        if not early:
            x = torch.cat([*prefix, x], dim=1)
        return x, grid

    def rotary_table(self, grid: Grid) -> Tensor | None:
        """Of the patch tokens, (N, 2D), None if positions do not rotate."""

    def forward(self, x: Tensor) -> tuple:
        """Extract features of images (B, 3, H, W), any H and W.

        Returns:
            tuple: For each of ``out_indices``, by ``out_type``: (B, P+N, C)
            for 'raw', (B, C, h, w) for 'featmap', else (B, C).
        """
        x, grid = self.embed(x)
        found = self.run_to_outputs(x, grid, self.rotary_table(grid))
        return tuple(
            self._format_output(out, grid) for out in found.layers.values()
        )

    def _fit_pretrained(self, state_dict: State) -> None:
        missing = {
            key: value
            for key, value in self.state_dict().items()
            if key.startswith(('ln1.', 'ln2.')) and key not in state_dict
        }
        if missing:
            print_log(
                f'Not in the pretrained weights, kept as initialised: '
                f'{", ".join(missing)}',
                logger='current',
            )
        state_dict.update(missing)

    def _adapt_state_dict(self, state_dict: State, prefix: str) -> None:
        super()._adapt_state_dict(state_dict, prefix)
        # The stock class would resize after the check; what it cannot resize
        # is reported there.
        if self.pos_embed is not None:
            with suppress(AssertionError):
                self._prepare_pos_embed(state_dict, prefix)

    @property
    def position_remedy(self) -> str:
        return (
            f'; it cannot be resized: {self.num_extra_tokens} prefix '
            'tokens and a square grid of patches are expected. Two prefix '
            'tokens are those of PMDistilledVisionTransformer'
        )


@MODELS.register_module()
class PMVisionTransformer(PretrainBackbone, vit.VisionTransformer):
    """mmpretrain's ``VisionTransformer`` with token compression.

    Takes all arguments of :class:`mmpretrain.models.VisionTransformer`, has
    the same checkpoint keys and, with ``compression=None``, gives the same
    results. Modifications:

    - with ``compression``, layers run on merged patch tokens; outputs 'raw'
      and 'featmap' still hold all patches;
    - loading a checkpoint whose weights are missing, unexpected or of another
      shape raises ``RuntimeError`` and names them. Position embeddings of
      another size are resized, as in the base class;
    - ``init_cfg=dict(type='Pretrained', ...)`` accepts a checkpoint of a
      whole classifier; output norms that it lacks (pre-training has none for
      ``out_type='avg_featmap'``) keep their initial values;
    - ``layer_cfgs=dict(with_cp=True)`` turns on activation checkpointing.

    Args:
        *args, **kwargs: See the base class.
        out_indices (int | Sequence[int]): By keyword. Defaults to -1.
        compression (dict, optional): See mmseg's
            :class:`~pm_seg.models.PMVisionTransformer`. Defaults to None.

    Raises:
        ValueError: On an unknown ``arch``, layers out of range or unknown
            ``compression``.

    Example:
        >>> model = dict(
        ...     backbone=dict(
        ...         type='PMVisionTransformer',
        ...         arch='deit-small',
        ...         compression=dict(keep=0.6)))
    """

    stock = vit.VisionTransformer

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().embed(images)
        return self.pre_norm(x), grid


@MODELS.register_module()
class PMDistilledVisionTransformer(
    PretrainBackbone, deit.DistilledVisionTransformer
):
    """mmpretrain's ``DistilledVisionTransformer`` with token compression.

    See :class:`PMVisionTransformer`; two prefix tokens, cls and dist, and
    both of them as the output with ``out_type='cls_token'``. As in the base
    class, ``pre_norm`` is built but not applied.
    """

    stock = deit.DistilledVisionTransformer


@MODELS.register_module()
class PMDeiT3(PretrainBackbone, deit3.DeiT3):
    """mmpretrain's ``DeiT3``, see :class:`PMVisionTransformer`."""

    stock = deit3.DeiT3
    layer_class = PMDeiT3Layer
    prefix_has_positions = False


@MODELS.register_module()
class PMBEiTViT(PretrainBackbone, beit.BEiTViT):
    """mmpretrain's ``BEiTViT``, see :class:`PMVisionTransformer`.

    Without relative position bias: EVA.

    Raises:
        ValueError: On relative position biases.
    """

    stock = beit.BEiTViT
    layer_class = PMBEiTLayer

    def adopt(self, compression: dict | None) -> None:
        if self.rel_pos_bias is not None or self.use_rel_pos_bias:
            raise ValueError(
                f'{type(self).__name__} cannot merge tokens under a relative '
                'position bias, which is of pairs of positions; use a model '
                'with use_rel_pos_bias=False and use_shared_rel_pos_bias='
                'False, as EVA-L and EVA-g are'
            )
        super().adopt(compression)


@MODELS.register_module()
class PMViTEVA02(PretrainBackbone, vit_eva02.ViTEVA02):
    """mmpretrain's ``ViTEVA02``, see :class:`PMVisionTransformer`."""

    stock = vit_eva02.ViTEVA02
    layer_class = PMEVA02Layer

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().embed(images)
        return self.pre_norm(x), grid

    def rotary_table(self, grid: Grid) -> Tensor:
        rope = self.rope
        if grid != tuple(self.patch_resolution):
            dims, device = 2 * rope.half_dim, rope.freqs_cos.device
            rope = RotaryEmbeddingFast(dims, grid, rope.theta).to(device)
        return torch.cat([rope.freqs_sin, rope.freqs_cos], dim=1)
