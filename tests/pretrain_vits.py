"""Small backbones for mmpretrain."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip('mmpretrain')

import mmpretrain.models  # noqa: E402, F401
from mmpretrain.registry import MODELS  # noqa: E402

import pm_seg  # noqa: E402, F401

DIMS = 24
ARCH = dict(
    embed_dims=DIMS, num_layers=3, num_heads=3, feedforward_channels=48
)
SMALL = dict(arch=ARCH, img_size=(64, 96), patch_size=16)
COMPRESSION = dict(keep=0.7, first=1)
PLAIN, DISTILLED = 'VisionTransformer', 'DistilledVisionTransformer'
ABSOLUTE = dict(use_abs_pos_emb=True, use_rel_pos_bias=False)
#: Stock classes, and options that make them complete.
BACKBONES = {
    PLAIN: {},
    DISTILLED: {},
    'DeiT3': {},
    'BEiTViT': dict(ABSOLUTE, layer_scale_init_value=0.1, bias='qv_bias'),
    'ViTEVA02': dict(sub_ln=True),
}


def make(kind: str, **options) -> torch.nn.Module:
    """A backbone of a stock class, or of ours, ``PM...``."""
    arguments = {**SMALL, **BACKBONES[kind.removeprefix('PM')], **options}
    return MODELS.get(kind)(**copy.deepcopy(arguments))


def build(compression: dict | None = COMPRESSION, kind=PLAIN, **options):
    torch.manual_seed(0)
    backbone = make(f'PM{kind}', compression=compression, **options)
    backbone.init_weights()
    compressor = backbone.compressor
    if compressor is not None and compressor.needs_scores:
        compressor.set_scores(torch.rand_like(compressor.scores) + 0.01)
    return backbone.eval()
