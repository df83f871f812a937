"""The Segmenter repository's checkpoints in mmseg's classes."""

from __future__ import annotations

import pytest
import torch
from foreign import (
    build_segmentor,
    close,
    part,
    random_linear,
    random_segmenter,
    run_segmenter,
)

from pm_seg.convert import Hints, convert_segmenter
from pm_seg.utils.checkpoints import CheckpointError

VARIANT = dict(
    dataset_kwargs=dict(dataset='ade20k', normalization='deit'),
    inference_kwargs=dict(im_size=32, window_size=24, window_stride=16),
    net_kwargs=dict(
        image_size=(24, 40),
        n_heads=4,
        n_layers=2,
        d_model=128,
        patch_size=8,
        drop_path_rate=0.2,
        decoder=dict(name='mask_transformer', n_layers=2, drop_path_rate=0.0),
    ),
)


def linear_segmenter() -> dict:
    state = random_segmenter()
    encoder = part(state, 'encoder.')
    decoder = random_linear('head', 4, 128)
    return {f'encoder.{k}': v for k, v in encoder.items()} | {
        f'decoder.{k}': v for k, v in decoder.items()
    }


@pytest.mark.parametrize(
    'make', [random_segmenter, linear_segmenter, lambda: no_qkv_bias()]
)
def test_same_masks(make) -> None:
    state = make()
    image = torch.randn(2, 3, 24, 24)
    converted = convert_segmenter(state, Hints())
    model = build_segmentor(converted.model, converted.state_dict)
    with torch.no_grad():
        masks = model(image, mode='tensor')
    close(masks, run_segmenter(state, image, heads=2))
    assert converted.scope == 'mmseg'
    assert len(converted.dataset_meta['classes']) == 4


def no_qkv_bias() -> dict:
    state = random_segmenter()
    return {k: v for k, v in state.items() if not k.endswith('qkv.bias')}


def foreign_name(key: str) -> str:
    """Our name of an entry as the repository's, the long way round."""
    part, key = key.split('.', 1)
    key = f'{dict(backbone="encoder", decode_head="decoder")[part]}.{key}'
    for ours, theirs in (
        ('encoder.ln1', 'encoder.norm'),
        ('layers.0.0', 'fc1'),
        ('ffn.layers.1', 'ffn.fc2'),
        ('.ffn.', '.mlp.'),
        ('.ln', '.norm'),
        ('.layers.', '.blocks.'),
        ('attn.attn.in_proj_', 'attn.qkv.'),
        ('attn.attn.out_proj', 'attn.proj'),
        ('projection', 'proj'),
        ('dec_proj', 'proj_dec'),
        ('patch_proj.weight', 'proj_patch'),
        ('classes_proj.weight', 'proj_classes'),
    ):
        key = key.replace(ours, theirs)
    return key


def test_round_trip_of_our_model() -> None:
    """Our model's own weights come back, all of them."""
    first = convert_segmenter(random_segmenter(), Hints())
    ours = build_segmentor(first.model, first.state_dict).state_dict()
    theirs = {foreign_name(key): value for key, value in ours.items()}
    for name in ('proj_patch', 'proj_classes'):
        theirs[f'decoder.{name}'] = theirs[f'decoder.{name}'].T
    again = convert_segmenter(theirs, Hints())
    assert again.model == first.model
    assert again.state_dict.keys() == ours.keys()
    for key, value in ours.items():
        assert torch.equal(again.state_dict[key], value), key


def test_variant() -> None:
    state = random_segmenter(classes=150, grid=(3, 5))
    converted = convert_segmenter(state, Hints(variant=VARIANT))
    model = converted.model
    assert model['backbone']['num_heads'] == 4
    assert model['decode_head']['num_heads'] == 4
    assert model['backbone']['img_size'] == (24, 40)
    assert model['backbone']['drop_path_rate'] == 0.2
    assert model['data_preprocessor']['mean'][0] == 123.675
    assert model['test_cfg'] == dict(
        mode='slide', crop_size=(24, 24), stride=(16, 16)
    )
    assert converted.dataset_meta['classes'][0] == 'wall'
    given = Hints(variant=VARIANT, num_heads=2, normalization='vit')
    model = convert_segmenter(state, given).model
    assert model['backbone']['num_heads'] == 2
    assert model['data_preprocessor']['mean'][0] == 127.5


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda s: s.update({'encoder.dist_token': torch.ones(1, 1, 128)}),
            'distillation token',
        ),
        (lambda s: s.pop('decoder.cls_emb'), 'expected decoder.cls_emb or'),
        (lambda s: s.pop('encoder.norm.bias'), 'encoder.norm.bias: missing'),
        (
            lambda s: s.update({'decoder.proj_patch': torch.ones(128, 4)}),
            r'decoder.proj_patch: got shape \(128, 4\)',
        ),
        (
            lambda s: s.update({'aux.weight': torch.ones(1)}),
            'aux.weight: unexpected',
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if k[:8] == 'decoder.'],
            'got no decoder',
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if k[:8] == 'encoder.'],
            'no Segmenter',
        ),
    ],
)
def test_damaged(change, message: str) -> None:
    state = random_segmenter()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert_segmenter(state, Hints())


def test_truncated_or_another_variant() -> None:
    state = random_segmenter(grid=(3, 5), depth=1)
    with pytest.raises(CheckpointError, match='n_layers=2, the weights have'):
        convert_segmenter(state, Hints(variant=VARIANT))


def test_a_classifier_is_not_a_segmenter() -> None:
    state = part(random_segmenter(), 'encoder.')
    with pytest.raises(CheckpointError, match="use the kind 'timm'"):
        convert_segmenter(state, Hints())
