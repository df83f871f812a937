"""Vision Transformer backbone with Prune-and-Merge token compression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.logging import print_log
from mmengine.utils import to_2tuple
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS
from torch import Tensor

from ...core.merging import Grid
from ..compressible import (
    CompressibleMixin,
    check_arguments,
    check_patches,
)
from ..features import FeatureMaps
from ..layers import append_layers

_PATCH_BIAS = 'patch_embed.projection.bias'


@MODELS.register_module()
class PMVisionTransformer(CompressibleMixin, VisionTransformer):
    """mmseg's ``VisionTransformer`` with token compression.

    Takes all arguments of :class:`mmseg.models.VisionTransformer`, has the
    same checkpoint keys and, with ``compression=None``, gives the same
    results. Modifications:

    - attention runs on fused kernels;
    - with ``compression``, layers run on merged patch tokens, and every
      output is still the full ``(B, C, h, w)`` map; a head can ask for the
      groups (:class:`~pm_seg.models.features.FeatureMaps`);
    - the patch embedding has a bias by default. mmseg >= 1.2 builds none and
      drops the one of older and converted checkpoints; a checkpoint without
      it loads as zero bias, which gives the same numbers;
    - loading a checkpoint whose weights are missing, unexpected or of another
      shape raises ``RuntimeError`` and names them.

    Args:
        compression (dict, optional): ``type`` 'pm' (default), 'paper',
            'tome' or 'algm' and the options of its class in
            :mod:`pm_seg.core`, for example ``dict(keep=0.5)`` for half of
            the layers' operations. None is the dense model. Defaults to
            None.

    Example:
        >>> model = dict(
        ...     backbone=dict(
        ...         type='PMVisionTransformer',
        ...         compression=dict(keep=0.5)))
    """

    own_keys = (
        'layers.',
        'compressor.',
        'patch_embed.',
        'pos_embed',
        'cls_token',
    )

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dims: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: int = 4,
        out_indices: int | Sequence[int] = -1,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        patch_bias: bool = True,
        num_fcs: int = 2,
        with_cp: bool = False,
        compression: dict | None = None,
        **kwargs,
    ) -> None:
        norm_cfg = norm_cfg or dict(type='LN')
        act_cfg = act_cfg or dict(type='GELU')
        if not isinstance(img_size, int):
            img_size = tuple(img_size)
        if out_indices == -1:
            out_indices = num_layers - 1
        check_patches(to_2tuple(img_size), to_2tuple(patch_size))
        check_arguments(self, VisionTransformer, kwargs)
        # The base class builds everything but the layers.
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dims=embed_dims,
            num_layers=0,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            out_indices=out_indices,
            qkv_bias=qkv_bias,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            patch_bias=patch_bias,
            num_fcs=num_fcs,
            with_cp=with_cp,
            **kwargs,
        )
        wrong = [i for i in self.out_indices if not 0 <= i < num_layers]
        if wrong:
            raise ValueError(
                f'out_indices={list(self.out_indices)} must lie in '
                f'0..{num_layers - 1}, the layers of this model'
            )
        append_layers(
            self.layers,
            num_layers,
            drop_path_rate,
            embed_dims=embed_dims,
            num_heads=num_heads,
            feedforward_channels=mlp_ratio * embed_dims,
            attn_drop_rate=attn_drop_rate,
            drop_rate=drop_rate,
            num_fcs=num_fcs,
            qkv_bias=qkv_bias,
            act_cfg=act_cfg,
            norm_cfg=norm_cfg,
            with_cp=with_cp,
        )
        self.build_compressor(
            compression,
            grid=(
                self.img_size[0] // patch_size,
                self.img_size[1] // patch_size,
            ),
            num_prefix=int(self.with_cls_token),
        )
        self._freeze()

    def embed(self, inputs: Tensor) -> tuple[Tensor, Grid]:
        """Images to tokens.

        Args:
            inputs (Tensor): (B, 3, H, W).

        Returns:
            tuple[Tensor, tuple[int, int]]: Tokens (B, P+N, C), and the grid
            (h, w) of the N patch tokens.
        """
        x, grid = self.patch_embed(inputs)
        cls_token = self.cls_token.expand(len(x), -1, -1)
        x = torch.cat((cls_token, x), dim=1)
        x = self._pos_embeding(x, grid, self.pos_embed)
        if not self.with_cls_token:
            x = x[:, 1:]
        if self.pre_norm:
            x = self.pre_ln(x)
        return x, (int(grid[0]), int(grid[1]))

    def to_map(self, x: Tensor, grid: Grid) -> Tensor | list[Tensor]:
        """Tokens (B, P+N, C) to a map (B, C, h, w), with cls if asked."""
        patches = x[:, 1:] if self.with_cls_token else x
        out = patches.transpose(1, 2).reshape(len(x), -1, *grid)
        return [out, x[:, 0]] if self.output_cls_token else out

    def forward(self, inputs: Tensor) -> FeatureMaps:
        """Extract feature maps.

        Args:
            inputs (Tensor): (B, 3, H, W), any H and W.

        Returns:
            FeatureMaps: A map (B, C, ceil(H / patch), ceil(W / patch)) for
            each of ``out_indices``; ``[map, cls]`` with
            ``output_cls_token``.
        """
        x, grid = self.embed(inputs)
        outs = [self.to_map(x, grid)] if self.out_origin else []
        _, collected, groups = self.run_layers(x, grid, self.out_indices)
        last = len(self.layers) - 1
        if self.final_norm and last in collected:
            collected[last] = self.norm1(collected[last])
        for index in sorted(collected):
            outs.append(self.to_map(collected[index], grid))
        return FeatureMaps(outs, groups)

    def train(self, mode: bool = True) -> PMVisionTransformer:
        super().train(mode)
        return self

    def init_weights(self) -> None:
        """Initialise, or load ``init_cfg=dict(type='Pretrained', ...)``.

        Differs from the base class in that a checkpoint of a whole segmentor
        is accepted and that one which does not fit raises ``RuntimeError``.
        """
        if not self.load_pretrained():
            super().init_weights()

    def _fit_pretrained(self, state_dict: dict[str, Tensor]) -> None:
        pos_embed = state_dict.get('pos_embed')
        if pos_embed is not None and pos_embed.shape != self.pos_embed.shape:
            state_dict['pos_embed'] = self._fit_pos_embed(pos_embed)

    def _fit_pos_embed(self, pos_embed: Tensor) -> Tensor:
        """Resize the position embedding of a square grid to this model's."""
        side = int((pos_embed.shape[1] - 1) ** 0.5)
        grid = tuple(size // self.patch_size for size in self.img_size)
        print_log(
            f'Resize the position embedding from {side}x{side} to '
            f'{grid[0]}x{grid[1]}',
            logger='current',
        )
        return self.resize_pos_embed(
            pos_embed, grid, (side, side), self.interpolate_mode
        )

    def _adapt_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str
    ) -> None:
        foreign = not any('compressor.' in key for key in state_dict)
        super()._adapt_state_dict(state_dict, prefix)
        bias, key = self.patch_embed.projection.bias, prefix + _PATCH_BIAS
        if bias is not None and key not in state_dict:
            state_dict[key] = torch.zeros_like(bias)
        elif bias is not None and foreign and state_dict[key].any():
            print_log(
                'The bias of the patch embedding in the checkpoint is used. '
                'VisionTransformer of mmseg >= 1.2 drops it, unless it has '
                'patch_bias=True: its results differ',
                logger='current',
            )

    def _shape_remedy(self, key: str) -> str:
        if key == 'pos_embed':
            return (
                f'; set img_size to that of the checkpoint, got img_size='
                f'{tuple(self.img_size)}, or load it as '
                "init_cfg=dict(type='Pretrained', ...), which resizes"
            )
        return super()._shape_remedy(key)
