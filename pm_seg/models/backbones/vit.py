"""Vision Transformer backbone with Prune-and-Merge token compression."""

from __future__ import annotations

import torch
from mmengine.logging import print_log
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS
from torch import Tensor

from ...core.merging import Grid
from ..compressible import StockBackbone
from ..features import FeatureMaps
from ..layers import PMTransformerEncoderLayer
from ..loading import State


@MODELS.register_module()
class PMVisionTransformer(StockBackbone, VisionTransformer):
    """mmseg's ``VisionTransformer`` with token compression.

    Takes all arguments of :class:`mmseg.models.VisionTransformer`, has the
    same checkpoint keys and, with ``compression=None``, gives the same
    results. Modifications:

    - attention runs on fused kernels;
    - with ``compression``, layers run on merged patch tokens, and every
      output is still the full ``(B, C, h, w)`` map; a head can ask for the
      groups (:class:`~pm_seg.models.features.FeatureMaps`);
    - ``out_indices`` may count from the end;
    - the patch embedding has a bias by default. mmseg >= 1.2 builds none and
      drops the one of older and converted checkpoints; a checkpoint without
      it loads as zero bias, which gives the same numbers;
    - loading a checkpoint whose weights are missing, unexpected or of another
      shape raises ``RuntimeError`` and names them;
    - ``init_cfg=dict(type='Pretrained', ...)`` accepts a checkpoint of a
      whole segmentor.

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

    stock = VisionTransformer
    layer_class = PMTransformerEncoderLayer

    def __init__(self, *args, patch_bias: bool = True, **kwargs) -> None:
        super().__init__(*args, patch_bias=patch_bias, **kwargs)
        self._freeze()

    @property
    def geometry(self) -> tuple[Grid, int, int]:
        height, width = (size // self.patch_size for size in self.img_size)
        return (height, width), int(self.with_cls_token), 0

    def embed(self, inputs: Tensor) -> tuple[Tensor, Grid]:
        """Images (B, 3, H, W) to tokens (B, P+N, C), and the grid of N."""
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
        """Extract feature maps of images (B, 3, H, W), any H and W.

        Returns:
            FeatureMaps: A map (B, C, ceil(H / patch), ceil(W / patch)) for
            each of ``out_indices``; ``[map, cls]`` with
            ``output_cls_token``.
        """
        x, grid = self.embed(inputs)
        outs = [self.to_map(x, grid)] if self.out_origin else []
        found = self.run_to_outputs(x, grid)
        for out in found.layers.values():
            outs.append(self.to_map(out, grid))
        return FeatureMaps(outs, found.groups)

    def _fit_pretrained(self, state_dict: State) -> None:
        """Resize the position embedding of a square grid to this model's."""
        pos_embed = state_dict.get('pos_embed')
        if pos_embed is None or pos_embed.shape == self.pos_embed.shape:
            return
        side = int((pos_embed.shape[1] - 1) ** 0.5)
        grid = self.geometry[0]
        print_log(
            f'Resize the position embedding from {side}x{side} to '
            f'{grid[0]}x{grid[1]}',
            logger='current',
        )
        state_dict['pos_embed'] = self.resize_pos_embed(
            pos_embed, grid, (side, side), self.interpolate_mode
        )

    def _adapt_state_dict(self, state_dict: State, prefix: str) -> None:
        foreign = not any('compressor.' in key for key in state_dict)
        super()._adapt_state_dict(state_dict, prefix)
        bias = self.patch_embed.projection.bias
        if bias is None:
            return
        key = f'{prefix}patch_embed.projection.bias'
        given = state_dict.setdefault(key, torch.zeros_like(bias))
        if foreign and given.any():
            print_log(
                'The bias of the patch embedding in the checkpoint is used. '
                'VisionTransformer of mmseg >= 1.2 drops it, unless it has '
                'patch_bias=True: its results differ',
                logger='current',
            )

    @property
    def position_remedy(self) -> str:
        return (
            f'; set img_size to that of the checkpoint, got img_size='
            f'{tuple(self.img_size)}, or load it as '
            "init_cfg=dict(type='Pretrained', ...), which resizes"
        )
