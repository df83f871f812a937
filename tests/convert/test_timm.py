"""timm's classifiers in mmpretrain's classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from foreign import (
    build_classifier,
    close,
    random_linear,
    random_norm,
    random_vit,
    run_vit,
)
from helpers import shared_path
from mmpretrain.models import VisionTransformer

from pm_seg.convert import Hints, convert_timm
from pm_seg.convert.keys import ARCHS
from pm_seg.utils.checkpoints import CheckpointError


def test_names_are_those_of_mmpretrain() -> None:
    for (dims, layers, hidden), (name, heads) in ARCHS.items():
        assert VisionTransformer.arch_zoo[name] == dict(
            embed_dims=dims,
            num_layers=layers,
            num_heads=heads,
            feedforward_channels=hidden,
        )


def plain(**kwargs) -> dict:
    return random_vit(**kwargs)


def without_qkv_bias() -> dict:
    state = random_vit()
    return {k: v for k, v in state.items() if not k.endswith('qkv.bias')}


def without_patch_bias() -> dict:
    state = random_vit()
    state.pop('patch_embed.proj.bias')
    return state


def layer_scale() -> dict:
    state = random_vit()
    for i in range(2):
        for name in ('ls1', 'ls2'):
            state[f'blocks.{i}.{name}.gamma'] = torch.rand(128)
    return state


def average_pool() -> dict:
    state = random_vit()
    for name in ('weight', 'bias'):
        del state[f'norm.{name}']
    return state | random_norm('fc_norm', 128)


def hidden_layer() -> dict:
    state = random_vit() | random_linear('pre_logits.fc', 96, 128)
    return state | random_linear('head', 5, 96)


def patch_positions() -> dict:
    state = random_vit()
    state['pos_embed'] = state['pos_embed'][:, 1:]
    return state


@pytest.mark.parametrize(
    'make',
    [
        plain,
        without_qkv_bias,
        without_patch_bias,
        layer_scale,
        average_pool,
        hidden_layer,
        patch_positions,
        lambda: random_vit(distilled=True),
        lambda: random_vit(distilled=True, grid=(4, 4), depth=3, patch=4),
    ],
)
def test_same_logits(make) -> None:
    state = make()
    converted = convert_timm(state, Hints())
    size = converted.model['backbone']['img_size']
    image = torch.randn(2, 3, *size)
    model = build_classifier(converted.model, converted.state_dict)
    close(model(image), run_vit(state, image, heads=2))


def test_kinds_of_models() -> None:
    model = convert_timm(random_vit(distilled=True), Hints()).model
    assert model['backbone']['type'] == 'PMDistilledVisionTransformer'
    assert model['head']['type'] == 'DeiTClsHead'
    assert model['data_preprocessor']['mean'][0] == 123.675
    model = convert_timm(random_vit(dims=192, depth=12), Hints()).model
    assert model['backbone']['arch'] == 'deit-tiny'
    assert model['backbone']['type'] == 'PMVisionTransformer'
    assert model['data_preprocessor']['mean'][0] == 127.5


def test_sizes_and_hints() -> None:
    state = random_vit(grid=(3, 4), dims=96)
    with pytest.raises(CheckpointError, match='--img-size HEIGHT WIDTH'):
        convert_timm(state, Hints(num_heads=3))
    with pytest.raises(CheckpointError, match='give --num-heads'):
        convert_timm(state, Hints(img_size=(24, 32)))
    with pytest.raises(CheckpointError, match='an image of 24x48 has 18'):
        convert_timm(state, Hints(num_heads=3, img_size=(24, 48)))
    converted = convert_timm(state, Hints(num_heads=3, img_size=(24, 32)))
    image = torch.randn(1, 3, 24, 32)
    model = build_classifier(converted.model, converted.state_dict)
    close(model(image), run_vit(state, image, heads=3))


@pytest.mark.parametrize(
    ('hints', 'mean'),
    [
        (Hints(name='deit_small.pth'), 123.675),
        (Hints(name='mae_pretrain_vit_base.pth'), 123.675),
        (Hints(name='deit_small.pth', normalization='vit'), 127.5),
        (Hints(normalization='imagenet'), 123.675),
        (
            Hints(pretrained_cfg=dict(mean=[0.4] * 3, std=[0.2] * 3)),
            pytest.approx(102),
        ),
    ],
)
def test_normalization(hints: Hints, mean: float) -> None:
    model = convert_timm(random_vit(), hints).model
    assert model['data_preprocessor']['mean'][0] == mean


def test_without_head() -> None:
    state = random_vit()
    del state['head.weight'], state['head.bias']
    state['mask_token'] = torch.zeros(1, 1, 128)
    state['decoder_pos_embed'] = torch.zeros(1, 10, 64)
    converted = convert_timm(state, Hints())
    assert converted.model['head'] is None
    assert any('no classification head' in n for n in converted.notes)
    model = build_classifier(converted.model, converted.state_dict)
    assert model(torch.randn(1, 3, 24, 24))[0].shape == (1, 128)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.pop('norm.weight'), 'norm.weight: missing'),
        (lambda s: s.pop('pos_embed'), 'expected pos_embed'),
        (
            lambda s: s.update({'head.weight': torch.ones(5, 7)}),
            r'head.weight: got shape \(5, 7\), expected \(5, 128\)',
        ),
        (lambda s: s.update(reg_token=torch.ones(1)), 'reg_token: unexpected'),
        (
            lambda s: [s.pop(k) for k in list(s) if 'blocks.0.attn' in k],
            'blocks.0.attn.proj.weight: missing',
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if 'blocks.0.' in k],
            'expected blocks.0.mlp.fc1.weight',
        ),
        (
            lambda s: s.update({'blocks.7.norm1.bias': torch.ones(128)}),
            'blocks.2.norm1.weight: missing',
        ),
        (
            lambda s: s.update({'norm.bias': torch.ones(128).int()}),
            'norm.bias: got torch.int32, expected floats',
        ),
        (
            lambda s: s.update({'blocks.0.merge_matrix': torch.ones(4, 10)}),
            "use the kind 'pm-vit'",
        ),
    ],
)
def test_damaged(change, message: str) -> None:
    state = random_vit()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert_timm(state, Hints())


@pytest.mark.parametrize(
    ('keys', 'advice'),
    [
        (['backbone.cls_token', 'head.weight'], 'OpenMMLab checkpoint'),
        (['encoder.blocks.0.x', 'decoder.y'], "use the kind 'segmenter'"),
        (
            ['encoder.blocks.0.merge_matrix', 'decoder.y'],
            "use the kind 'pm-segmenter'",
        ),
        (['Transformer/encoderblock_0/x'], 'JAX'),
        (['layer1.0.conv1.weight'], 'only plain Vision Transformers'),
    ],
)
def test_foreign(keys: list[str], advice: str) -> None:
    with pytest.raises(CheckpointError, match=advice):
        convert_timm({key: torch.ones(1) for key in keys}, Hints())


def test_real_weights_recognise_images() -> None:
    """Of 20 photographs most are recognised: 82.7 % of all 1000."""
    import cv2

    folder = shared_path('data/imagenet_samples')
    with np.load(shared_path('weights/vit_tiny_patch16_224.npz')) as file:
        state = {key: torch.from_numpy(file[key]) for key in file.files}
    converted = convert_timm(state, Hints())
    assert len(converted.dataset_meta['classes']) == 1000
    model = build_classifier(converted.model, converted.state_dict)
    labels = dict(
        line.split()[:2]
        for line in (folder / 'labels.txt').read_text().splitlines()
    )
    images = []
    chosen = sorted(labels)[::50]
    for name in chosen:
        image = cv2.imread(str(folder / name))[..., ::-1]
        scale = 248 / min(image.shape[:2])
        image = cv2.resize(
            image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA
        )
        top, left = ((n - 224) // 2 for n in image.shape[:2])
        images.append(image[top : top + 224, left : left + 224].copy())
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    found = model((batch - 127.5) / 127.5).argmax(1)
    right = sum(int(labels[n]) == p for n, p in zip(chosen, found.tolist()))
    assert right >= 14
