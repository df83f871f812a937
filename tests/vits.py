"""Small backbones for mmseg."""

from __future__ import annotations

import torch

from pm_seg.models import PMVisionTransformer

SMALL = dict(
    img_size=(64, 96), patch_size=16, embed_dims=24, num_layers=3, num_heads=3
)


def build(compression: dict | None, **options) -> PMVisionTransformer:
    """A backbone that is ready to run; no two patches are alike to it."""
    torch.manual_seed(0)
    backbone = PMVisionTransformer(
        **{**SMALL, 'compression': compression, **options}
    )
    backbone.init_weights()
    for parameter in backbone.parameters():
        if parameter.dim() > 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    compressor = backbone.compressor
    if compressor is not None and compressor.needs_scores:
        compressor.set_scores(torch.rand_like(compressor.scores) + 0.01)
    return backbone.eval()
