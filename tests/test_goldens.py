"""Parity with references made by running the released code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import shared_path
from torch import Tensor

from pm_seg.models import PMSegmenterMaskTransformerHead, PMVisionTransformer

_BLOCK_KEYS = {
    'norm1': 'ln1',
    'norm2': 'ln2',
    'attn.qkv.weight': 'attn.attn.in_proj_weight',
    'attn.qkv.bias': 'attn.attn.in_proj_bias',
    'attn.proj': 'attn.attn.out_proj',
    'mlp.fc1': 'ffn.layers.0.0',
    'mlp.fc2': 'ffn.layers.1',
}

# 'attn.bias' is stored by the release but takes no part in its forward pass.
_TOKEN_MAP_KEYS = (
    'merge_matrix',
    'recover_matrix',
    'token_mask',
    'attn.bias',
)


def load(name: str) -> dict[str, Tensor]:
    with np.load(shared_path(f'golden/{name}')) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def block_key(key: str) -> str:
    key = key.replace('blocks.', 'layers.')
    for old, new in _BLOCK_KEYS.items():
        key = key.replace(old, new)
    return key


def backbone_state(golden: dict[str, Tensor], prefix: str) -> dict:
    state = {}
    for key, value in golden.items():
        if not key.startswith(prefix):
            continue
        key = key.removeprefix(prefix)
        if key.startswith('blocks.'):
            if not key.endswith(_TOKEN_MAP_KEYS):
                state[block_key(key)] = value
        elif key.startswith('norm.'):
            state[key.replace('norm', 'ln1')] = value
        elif key.startswith('patch_embed'):
            state[key.replace('proj', 'projection')] = value
        elif not key.startswith('head.'):
            state[key] = value
    return state


def build_backbone(
    golden: dict[str, Tensor], prefix: str, compression: dict
) -> PMVisionTransformer:
    dims = golden[f'{prefix}pos_embed'].shape[-1]
    backbone = PMVisionTransformer(
        img_size=int(golden['img_size']),
        embed_dims=dims,
        num_heads=int(golden['num_heads']),
        final_norm=True,
        output_cls_token=True,
        norm_cfg=dict(
            type='LN', eps=1e-5 if prefix == 'sd/encoder.' else 1e-6
        ),
        compression=compression,
    )
    backbone.load_state_dict(backbone_state(golden, prefix))
    return backbone.eval()


@pytest.fixture(scope='module')
def vit() -> dict[str, Tensor]:
    return load('pm_vit_keep0.6_prune0.1.npz')


@pytest.fixture(scope='module')
def segmenter() -> dict[str, Tensor]:
    return load('pm_segmenter_keep0.7.npz')


def vit_compression(golden: dict[str, Tensor], matrices: str) -> dict:
    return dict(
        keep=float(golden['keep']),
        prune=float(golden['prune']),
        decay=0.025,
        budget='global',
        builder='row_window',
        restore='replace',
        matrices=matrices,
        num_groups=(golden['channels'] - 1).tolist()
        if matrices == 'dense'
        else None,
    )


def vit_logits(golden, backbone) -> Tensor:
    with torch.no_grad():
        _, cls = backbone(golden['image'])[0]
    return F.linear(cls, golden['sd/head.weight'], golden['sd/head.bias'])


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('matrices', ['sparse', 'dense'])
def test_classification_release(vit, matrices: str) -> None:
    backbone = build_backbone(vit, 'sd/', vit_compression(vit, matrices))
    compressor = backbone.compressor
    compressor.set_scores(vit['scores'])
    assert [n + 1 for n in compressor.num_groups] == vit['channels'].tolist()
    for layer, token_map in enumerate(compressor.token_maps((14, 14))):
        if matrices == 'sparse':
            token_map = token_map.to_dense()
        name = f'sd/blocks.{layer}.attn'
        close(token_map.merge_matrix, vit[f'{name}.merge_matrix'], 1e-4)
        close(token_map.restore_matrix, vit[f'{name}.recover_matrix'], 1e-4)
        assert torch.equal(token_map.live.float(), vit[f'{name}.token_mask'])
    close(vit_logits(vit, backbone), vit['logits'], 1e-4)


def test_classification_release_trained(vit) -> None:
    """Trained matrices have values everywhere: the dense form only."""
    backbone = build_backbone(vit, 'sd/', vit_compression(vit, 'dense'))
    compressor = backbone.compressor
    compressor.set_scores(vit['scores'])
    with torch.no_grad():
        for layer in range(12):
            merge = vit[f'trained/{layer}/merge']
            assert (merge != 0).float().mean() > 0.9
            compressor.merge_matrix[str(layer)].copy_(merge)
            compressor.restore_matrix[str(layer)].copy_(
                vit[f'trained/{layer}/recover']
            )
    close(vit_logits(vit, backbone), vit['logits_trained'], 1e-3)


def build_head(golden: dict[str, Tensor]) -> PMSegmenterMaskTransformerHead:
    dims = golden['sd/decoder.proj_dec.weight'].shape[0]
    classes = int(golden['n_cls'])
    head = PMSegmenterMaskTransformerHead(
        in_channels=dims,
        channels=dims,
        embed_dims=dims,
        num_layers=2,
        num_heads=1,
        num_classes=classes,
        dropout_ratio=0.0,
    )
    state = {}
    for key, value in golden.items():
        if not key.startswith('sd/decoder.'):
            continue
        key = key.removeprefix('sd/decoder.')
        if key.startswith('blocks.'):
            state[block_key(key)] = value
        elif key == 'proj_patch':
            state['patch_proj.weight'] = value.T
        elif key == 'proj_classes':
            state['classes_proj.weight'] = value.T
        else:
            state[key.replace('proj_dec', 'dec_proj')] = value
    head.load_state_dict(state)
    return head.eval()


@pytest.mark.parametrize('matrices', ['sparse', 'dense'])
def test_segmentation_release(segmenter, matrices: str) -> None:
    layers = segmenter['merge_list'].tolist()
    counts = segmenter['merged_tokens']
    backbone = build_backbone(
        segmenter,
        'sd/encoder.',
        dict(
            keep=float(segmenter['keep']),
            prune=float(segmenter['prune']),
            layers=layers,
            budget='layer',
            builder='row_window',
            restore='replace',
            matrices=matrices,
            num_groups=(counts[layers] - 1).tolist()
            if matrices == 'dense'
            else None,
        ),
    )
    compressor = backbone.compressor
    compressor.set_scores(segmenter['scores'])
    assert [n + 1 for n in compressor.num_groups] == counts.tolist()
    maps = compressor.token_maps((8, 8))
    for layer in layers:
        token_map = maps[layer]
        if matrices == 'sparse':
            token_map = token_map.to_dense()
        name = f'sd/encoder.blocks.{layer}'
        close(token_map.merge_matrix, segmenter[f'{name}.merge_matrix'], 1e-4)
        close(
            token_map.restore_matrix,
            segmenter[f'{name}.recover_matrix'],
            1e-4,
        )
    head = build_head(segmenter)
    with torch.no_grad():
        feature, _ = backbone(segmenter['image'])[0]
        masks = head([feature])
    masks = F.interpolate(masks, size=(128, 128), mode='bilinear')
    close(masks, segmenter['masks'], 1e-4)
