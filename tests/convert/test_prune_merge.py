"""Released Prune-and-Merge models: token maps come over whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign import (
    build_classifier,
    build_segmentor,
    close,
    random_matrices,
    random_segmenter,
    random_vit,
    run_segmenter,
    run_vit,
)
from helpers import shared_path

from pm_seg.convert import (
    Hints,
    convert_pm_segmenter,
    convert_pm_vit,
    convert_timm,
    read_source,
)
from pm_seg.utils.checkpoints import CheckpointError


def random_pm_vit(distilled: bool = False) -> dict:
    prefix = 1 + distilled
    tokens = 16 + prefix
    state = random_vit(grid=(4, 4), depth=3, distilled=distilled)
    for layer, slots in ((0, 12), (2, 9)):
        name = f'blocks.{layer}.attn'
        state |= random_matrices([name], tokens, slots, 2, prefix)
        state[f'{name}.bias'] = torch.randn(slots)
    return state


@pytest.mark.parametrize('distilled', [False, True])
def test_trained_classifier(distilled: bool) -> None:
    state = random_pm_vit(distilled)
    converted = convert_pm_vit(state, Hints())
    compression = converted.model['backbone']['compression']
    prefix = 1 + distilled
    assert compression['layers'] == [0, 2]
    assert compression['num_groups'] == [12 - prefix, 9 - prefix]
    assert compression['matrices'] == 'dense'
    assert compression['prune_rate'] == 2 / 16
    assert compression['type'] == 'paper'
    image = torch.randn(2, 3, 32, 32)
    expected = run_vit(state, image, heads=2)
    model = build_classifier(converted.model, converted.state_dict)
    close(model(image), expected)
    plain = {
        k: v
        for k, v in state.items()
        if not any(s in k for s in ('matrix', 'mask', 'attn.bias'))
    }
    assert (run_vit(plain, image, 2) - expected).abs().max() > 0.01
    assert converted.state_dict.keys() > (
        convert_timm(plain, Hints()).state_dict.keys()
    )


def test_trained_segmenter_with_merge_list() -> None:
    state = random_segmenter(grid=(4, 4), depth=4)
    state |= random_matrices(
        ['encoder.blocks.1', 'encoder.blocks.3'], 17, 10, pruned=3
    )
    facts = dict(
        merge_list=torch.tensor([1, 3]),
        merged_tokens=torch.tensor([17, 10, 17, 10]),
        scores=torch.rand(4, 16),
        keep=torch.tensor(0.6),
    )
    converted = convert_pm_segmenter(state, Hints(facts=facts))
    compression = converted.model['backbone']['compression']
    assert compression['keep_rate'] == pytest.approx(0.6)
    assert compression['threshold'] == 'layer'
    stored = converted.state_dict['backbone.compressor.scores']
    assert torch.equal(stored, facts['scores'])
    image = torch.randn(2, 3, 32, 32)
    model = build_segmentor(converted.model, converted.state_dict)
    with torch.no_grad():
        masks = model(image, mode='tensor')
    close(masks, run_segmenter(state, image, heads=2))
    loads = model.backbone.compressor.loads()
    assert [load.kept for load in loads] == [16, 9, 16, 9]
    assert [load.pruned for load in loads] == [0, 3, 0, 3]

    # Blocks outside the list run on all tokens, whatever is stored.
    facts = dict(merge_list=torch.tensor([3]), scores=torch.rand(1, 16))
    converted = convert_pm_segmenter(state, Hints(facts=facts))
    kept = {k: v for k, v in state.items() if 'blocks.1.merge' not in k}
    model = build_segmentor(converted.model, converted.state_dict)
    with torch.no_grad():
        masks = model(image, mode='tensor')
    close(masks, run_segmenter(kept, image, heads=2))


def no_entry(name: str):
    def change(state: dict, facts: dict) -> None:
        del state[f'blocks.2.attn.{name}']

    return change


def fact(**values):
    def change(state: dict, facts: dict) -> None:
        facts.update({k: torch.tensor(v) for k, v in values.items()})

    return change


def entry(name: str, value: torch.Tensor):
    def change(state: dict, facts: dict) -> None:
        state[f'blocks.2.attn.{name}'] = value

    return change


def not_compressed(state: dict, facts: dict) -> None:
    for key in [k for k in state if 'matrix' in k or 'mask' in k]:
        del state[key]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (no_entry('token_mask'), 'block 2 has no token_mask'),
        (no_entry('recover_matrix'), 'block 2 has no recover_matrix'),
        (entry('merge_matrix', torch.ones(9, 5)), 'expected merge_matrix'),
        (entry('token_mask', torch.full((17,), 0.5)), 'other than 0 and 1'),
        (entry('token_mask', torch.zeros(17)), 'a pruned prefix token'),
        (fact(merge_list=[0, 1, 2]), 'block 1 has no merge_matrix'),
        (fact(scores=[[1.0, 2.0]]), r'scores have shape \(1, 2\)'),
        (fact(scores=[[-1.0] * 16] * 3), 'scores must be >= 0'),
        (fact(keep=1.5), 'keep_rate=1.5 is not in'),
        (not_compressed, 'this checkpoint is not compressed'),
    ],
)
def test_contradictions(change, message: str) -> None:
    state, facts = random_pm_vit(), {}
    change(state, facts)
    with pytest.raises(CheckpointError, match=message):
        convert_pm_vit(state, Hints(facts=facts))


def test_groups_for_which_no_token_counts_most() -> None:
    """Whatever the trained matrices have become, they are taken over."""
    state = random_segmenter(grid=(4, 4), depth=2)
    state |= random_matrices(['encoder.blocks.1'], 17, 10, pruned=3)
    state['encoder.blocks.1.merge_matrix'][4] *= 1e-6
    converted = convert_pm_segmenter(state, Hints())
    image = torch.randn(2, 3, 32, 32)
    model = build_segmentor(converted.model, converted.state_dict)
    with torch.no_grad():
        masks = model(image, mode='tensor')
    close(masks, run_segmenter(state, image, heads=2))
    loads = model.backbone.compressor.loads()
    assert [load.kept for load in loads] == [16, 9]
    assert [load.pruned for load in loads] == [0, 3]


@pytest.fixture(scope='module')
def vit() -> dict:
    return golden('pm_vit_keep0.6_prune0.1')


def golden(name: str) -> dict:
    with np.load(shared_path(f'golden/{name}.npz')) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def test_golden_classifier(vit: dict) -> None:
    state, hints = read_source(
        shared_path('golden/pm_vit_keep0.6_prune0.1.npz')
    )
    converted = convert_pm_vit(state, hints)
    model = build_classifier(converted.model, converted.state_dict)
    close(model(vit['image']), vit['logits'])
    state = converted.state_dict
    assert torch.equal(state['backbone.compressor.scores'], vit['scores'])


def test_golden_classifier_trained(vit: dict, tmp_path) -> None:
    """As a training run saves it: nested, with matrices of its own."""
    state = {k[3:]: v for k, v in vit.items() if k.startswith('sd/')}
    for layer in range(12):
        for old in ('merge', 'recover'):
            name = f'blocks.{layer}.attn.{old}_matrix'
            state[name] = vit[f'trained/{layer}/{old}']
    content = dict(
        model=state, channels=vit['channels'].tolist(), num_heads=1, epoch=3
    )
    torch.save(content, tmp_path / 'trained.pth')
    state, hints = read_source(tmp_path / 'trained.pth')
    converted = convert_pm_vit(state, hints)
    model = build_classifier(converted.model, converted.state_dict)
    close(model(vit['image']), vit['logits_trained'], 1e-3)
    compression = converted.model['backbone']['compression']
    assert compression['num_groups'] == (vit['channels'] - 1).tolist()


def test_golden_segmenter() -> None:
    file = golden('pm_segmenter_keep0.7')
    state, hints = read_source(shared_path('golden/pm_segmenter_keep0.7.npz'))
    converted = convert_pm_segmenter(state, hints)
    model = build_segmentor(converted.model, converted.state_dict)
    with torch.no_grad():
        masks = model(file['image'], mode='tensor')
    size = file['image'].shape[2:]
    close(F.interpolate(masks, size=size, mode='bilinear'), file['masks'])
