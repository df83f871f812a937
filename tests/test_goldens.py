"""Parity with references made by running the released code.

Weights come over by the converter, whose own tests compare the trained dense
form; here structures are built anew from the scores.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign import build_classifier, build_segmentor, close
from helpers import shared_path
from torch import Tensor

from pm_seg.convert import CONVERTERS, Converted, read_source
from pm_seg.core import (
    EncoderShape,
    LayerCost,
    StaticCompressor,
    make_compressor,
)
from pm_seg.core.merging import Grid

VIT = 'golden/pm_vit_keep0.6_prune0.1.npz'
SEGMENTER = 'golden/pm_segmenter_keep0.7.npz'


def load(name: str) -> dict[str, Tensor]:
    with np.load(shared_path(name)) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def restructure(
    kind: str, name: str, grid: Grid, options: dict
) -> tuple[Converted, StaticCompressor]:
    """Convert a golden and build its structure from its scores."""
    state, hints = read_source(shared_path(name))
    converted = CONVERTERS[kind](state, hints)
    state = converted.state_dict
    dims = state['backbone.pos_embed'].shape[2]
    shape = EncoderShape(12, grid, 1, dims, dims, LayerCost(1, 1, 1))
    compressor = make_compressor(options, shape)
    compressor.set_scores(hints.facts['scores'])
    for key in [key for key in state if '.compressor.' in key]:
        del state[key]
    for key, value in compressor.state_dict().items():
        state[f'backbone.compressor.{key}'] = value
    converted.model['backbone']['compression'] = options
    return converted, compressor


@pytest.mark.parametrize('matrices', ['sparse', 'dense'])
def test_classification_release(matrices: str) -> None:
    golden = load(VIT)
    options = dict(
        type='paper',
        keep_rate=float(golden['keep']),
        prune_rate=float(golden['prune']),
        decay=0.025,
        threshold='global',
        matrices=matrices,
        num_groups=(golden['channels'] - 1).tolist()
        if matrices == 'dense'
        else None,
    )
    converted, compressor = restructure('pm-vit', VIT, (14, 14), options)
    slots = [load.kept + 1 for load in compressor.loads()]
    assert slots == golden['channels'].tolist()
    for layer, token_map in enumerate(compressor.token_maps((14, 14))):
        if matrices == 'sparse':
            token_map = token_map.to_dense()
        name = f'sd/blocks.{layer}.attn'
        merge = golden[f'{name}.merge_matrix']
        close(token_map.merge_matrix, merge, 2e-7)
        close(token_map.restore_matrix, golden[f'{name}.recover_matrix'])
        mask = golden[f'{name}.token_mask']
        assert torch.equal(token_map.live.float(), mask)
    model = build_classifier(converted.model, converted.state_dict)
    close(model(golden['image']), golden['logits'])


@pytest.mark.parametrize('matrices', ['sparse', 'dense'])
def test_segmentation_release(matrices: str) -> None:
    golden = load(SEGMENTER)
    layers = golden['merge_list'].tolist()
    counts = golden['merged_tokens']
    options = dict(
        type='paper',
        keep_rate=float(golden['keep']),
        prune_rate=float(golden['prune']),
        layers=layers,
        threshold='layer',
        matrices=matrices,
        num_groups=(counts[layers] - 1).tolist()
        if matrices == 'dense'
        else None,
    )
    converted, compressor = restructure(
        'pm-segmenter', SEGMENTER, (8, 8), options
    )
    slots = [load.kept + 1 for load in compressor.loads()]
    assert slots == counts.tolist()
    maps = compressor.token_maps((8, 8))
    for layer in layers:
        token_map = maps[layer]
        if matrices == 'sparse':
            token_map = token_map.to_dense()
        name = f'sd/encoder.blocks.{layer}'
        merge = golden[f'{name}.merge_matrix']
        close(token_map.merge_matrix, merge, 2e-7)
        close(token_map.restore_matrix, golden[f'{name}.recover_matrix'])
    model = build_segmentor(converted.model, converted.state_dict)
    with torch.no_grad():
        masks = model(golden['image'], mode='tensor')
    masks = F.interpolate(masks, size=(128, 128), mode='bilinear')
    close(masks, golden['masks'])
