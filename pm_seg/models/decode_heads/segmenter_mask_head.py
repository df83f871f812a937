"""Segmenter's mask transformer with token compression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import SegmenterMaskTransformerHead
from mmseg.registry import MODELS
from torch import Tensor

from ..compressible import CompressibleMixin
from ..layers import append_layers


@MODELS.register_module()
class PMSegmenterMaskTransformerHead(
    CompressibleMixin, SegmenterMaskTransformerHead
):
    """mmseg's ``SegmenterMaskTransformerHead`` with token compression.

    Takes all arguments of the stock head, has its checkpoint keys and, with
    ``compression=None``, gives its results. With ``compression`` the layers
    of the mask transformer run on merged patch tokens, the class embeddings
    being prefix tokens, and masks come out for the full grid.

    Args:
        compression (dict, optional): Options of
            :class:`pm_seg.core.TokenCompressor`. ``grid``, the patch rows
            and columns of a training crop, is required because a head does
            not know the image size, for example
            ``dict(grid=(32, 32), keep=0.7)``. Defaults to None.

    Raises:
        ValueError: If ``compression`` has no ``grid``.
    """

    own_keys = ('',)  # all of them

    def __init__(
        self,
        in_channels: int,
        num_layers: int,
        num_heads: int,
        embed_dims: int,
        mlp_ratio: int = 4,
        drop_path_rate: float = 0.1,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        num_fcs: int = 2,
        qkv_bias: bool = True,
        act_cfg: dict | None = None,
        norm_cfg: dict | None = None,
        compression: dict | None = None,
        **kwargs,
    ) -> None:
        norm_cfg = norm_cfg or dict(type='LN')
        act_cfg = act_cfg or dict(type='GELU')
        # The base class builds everything but the layers.
        super().__init__(
            in_channels=in_channels,
            num_layers=0,
            num_heads=num_heads,
            embed_dims=embed_dims,
            norm_cfg=norm_cfg,
            **kwargs,
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
        )
        if compression is not None and 'grid' not in compression:
            raise ValueError(
                'compression of the head needs grid=(rows, columns), the '
                'patch grid of a training crop: crop size / patch size'
            )
        self.build_compressor(
            compression, grid=(0, 0), num_prefix=self.num_classes
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Predict masks.

        Args:
            inputs (Sequence[Tensor]): Feature maps of the backbone; the one
                at ``in_index`` is (B, C, h, w).

        Returns:
            Tensor: Mask logits, (B, num_classes, h, w).
        """
        x = self._transform_inputs(inputs)
        batch, _, height, width = x.shape
        x = self.dec_proj(x.flatten(2).transpose(1, 2))
        # Class embeddings go first: they are prefix tokens of the token maps.
        x = torch.cat((self.cls_emb.expand(batch, -1, -1), x), 1)
        x, _ = self.run_layers(x, (height, width))
        x = self.decoder_norm(x)

        classes = self.classes_proj(x[:, : self.num_classes])
        patches = self.patch_proj(x[:, self.num_classes :])
        classes = F.normalize(classes, dim=2)
        patches = F.normalize(patches, dim=2)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks.transpose(1, 2).reshape(batch, -1, height, width)
