"""Segmenter's mask transformer on the groups of the backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import SegmenterMaskTransformerHead
from mmseg.registry import MODELS
from torch import Tensor

from ..core import run_dense
from .layers import PMTransformerEncoderLayer
from .loading import StrictLoading


@MODELS.register_module()
class PMSegmenterMaskTransformerHead(
    StrictLoading, SegmenterMaskTransformerHead
):
    """mmseg's ``SegmenterMaskTransformerHead`` on fewer tokens.

    Takes all arguments of the stock head and has its checkpoint keys. Behind
    a compressed backbone the layers run on the groups that the backbone's
    last layer worked on, means of their projected tokens, and every token
    gets what its group gained (as in
    :meth:`pm_seg.core.Merge.restore`): masks come out for the full grid.
    Behind any other backbone, or a neck, it gives the stock head's results.

    Args:
        follow_groups (bool): Whether to run on the backbone's groups.
            Defaults to True.
    """

    def __init__(self, *args, follow_groups: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.follow_groups = follow_groups
        for layer in self.layers:
            PMTransformerEncoderLayer.adopt(layer)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Mask logits (B, num_classes, h, w) from maps of the backbone."""
        groups = getattr(inputs, 'groups', None)
        x = self._transform_inputs(inputs)
        batch, _, height, width = x.shape
        x = self.dec_proj(x.flatten(2).transpose(1, 2))
        tokens, classes = x, self.cls_emb.expand(batch, -1, -1)
        if groups is not None and self.follow_groups:
            tokens = groups.mean(x)
        # Class embeddings go first, as prefix tokens.
        after = run_dense(self.layers, torch.cat([classes, tokens], 1)).last
        classes, after = after.tensor_split([self.num_classes], dim=1)
        x = after if tokens is x else x + groups.spread(after - tokens)
        classes = self.classes_proj(self.decoder_norm(classes))
        patches = self.patch_proj(self.decoder_norm(x))
        classes = F.normalize(classes, dim=2)
        patches = F.normalize(patches, dim=2)
        masks = self.mask_norm(patches @ classes.transpose(1, 2))
        return masks.transpose(1, 2).reshape(batch, -1, height, width)
