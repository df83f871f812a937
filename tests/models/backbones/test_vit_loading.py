"""Checkpoints that fit, and those that do not."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from toy import KINDS
from vits import SMALL, build

from pm_seg.models import PMVisionTransformer
from pm_seg.models.backbones import vit


def test_keeps_a_patch_bias() -> None:
    source = build(None)
    torch.nn.init.normal_(source.patch_embed.projection.bias)
    target = build(None)
    target.load_state_dict(source.state_dict())
    assert torch.equal(
        target.patch_embed.projection.bias, source.patch_embed.projection.bias
    )
    without = build(None, patch_bias=False)
    with pytest.raises(RuntimeError, match='projection.bias: unexpected'):
        without.load_state_dict(source.state_dict())


def changed(state: dict, change) -> dict:
    state = dict(state)
    change(state)
    return state


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda s: s.pop('layers.1.ln2.weight'),
            r'layers.1.ln2.weight: missing, expected \(24,\)',
        ),
        (
            lambda s: s.update({'layers.3.ln1.bias': torch.zeros(24)}),
            'layers.3.ln1.bias: unexpected',
        ),
        (
            lambda s: s.update({'cls_token': torch.zeros(1, 1, 25)}),
            r'cls_token: shape \(1, 1, 25\), expected \(1, 1, 24\)',
        ),
        (
            lambda s: s.update({'pos_embed': torch.zeros(1, 17, 24)}),
            r'pos_embed: .*set img_size .* img_size=\(64, 96\)',
        ),
    ],
)
@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
def test_loading_fails_loudly(change, message: str, loader: str) -> None:
    """Also through mmengine, which would only log what does not fit."""
    source, target = build(None), build(None)
    before = copy.deepcopy(target.state_dict())
    state = changed(source.state_dict(), change)
    with pytest.raises(RuntimeError, match=message):
        if loader == 'torch':
            target.load_state_dict(state, strict=False)
        else:
            load_state_dict(target, state, strict=False)
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key])


@torch.no_grad()
def test_a_dense_checkpoint_runs_compressed() -> None:
    """As it is, with the schedule that the config asks for."""
    dense, compressed = build(None), build(dict(keep=0.7))
    for parameter in dense.parameters():
        parameter += 0.1
    before = copy.deepcopy(compressed.compressor.state_dict())
    images = torch.randn(1, 3, 64, 96)
    for load in (
        lambda: compressed.load_state_dict(dense.state_dict()),
        lambda: load_state_dict(compressed, dense.state_dict(), strict=True),
    ):
        load()
        for key, value in compressed.compressor.state_dict().items():
            assert torch.equal(value, before[key])
        assert not compressed.compressor.compressed
        out = compressed(images)
        assert out.groups is not None
        with compressed.compressor.disabled():
            assert torch.equal(compressed(images)[0], dense(images)[0])
    paper = PMVisionTransformer(**SMALL, compression=KINDS['paper'])
    paper.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match='there is no structure yet'):
        paper(images)


@torch.no_grad()
def test_compressed_checkpoints() -> None:
    """They fit their own kind of compression alone; any grid and keep."""
    source = build(dict(keep=0.6))
    source.compressor.settle()
    fresh = build(dict(keep=0.9), img_size=(64, 64))
    state = source.state_dict()
    state['pos_embed'] = fresh.pos_embed
    fresh.load_state_dict(state)
    assert fresh.compressor.compressed
    tokens = [b.compressor.tokens((9, 9)) for b in (source, fresh)]
    assert tokens[0] == tokens[1]
    with pytest.raises(RuntimeError, match='checkpoint and the model is den'):
        build(None).load_state_dict(source.state_dict())
    paper = build(KINDS['paper'])
    for model, other in ((paper, source), (source, paper)):
        with pytest.raises(RuntimeError, match='compressed in another way'):
            model.load_state_dict(other.state_dict())
    other = PMVisionTransformer(
        **{**SMALL, 'img_size': (64, 64)}, compression=KINDS['paper']
    )
    with pytest.raises(RuntimeError, match='made for another grid'):
        other.load_state_dict(paper.state_dict())


def test_checkpoints_of_the_first_version_say_how_to_go_on() -> None:
    """0.1 had entries of other names; nothing is loaded silently."""
    state = build(None).state_dict()
    for name, shape in (
        ('scores', (3, 24)),
        ('group', (3, 24)),
        ('merge_weight', (3, 24)),
        ('restore_weight', (3, 24)),
        ('losses', (3, 9)),
    ):
        state[f'compressor.{name}'] = torch.ones(shape)
    model = build(dict(keep=0.5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError) as error:
        load_state_dict(model, state)
    text = str(error.value)
    assert 'pm_seg 0.1' in text and 'load the dense checkpoint' in text
    assert 'tools/compress.py' in text
    assert len(text.splitlines()) == 2
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_patch_bias_in_use_is_said(monkeypatch) -> None:
    """mmseg >= 1.2 drops it: results differ from the stock model's."""
    source = build(None)
    model = build(dict(keep=0.6))
    said = 'bias of the patch embedding in the checkpoint is used'

    def messages(state: dict) -> str:
        texts = []
        monkeypatch.setattr(
            vit, 'print_log', lambda text, **options: texts.append(text)
        )
        model.load_state_dict(state)
        return ' '.join(texts)

    state = source.state_dict()
    state['patch_embed.projection.bias'] = torch.zeros(24)
    assert said not in messages(state)
    del state['patch_embed.projection.bias']
    assert said not in messages(state)
    state['patch_embed.projection.bias'] = torch.ones(24)
    text = messages(state)
    assert said in text and 'patch_bias=True' in text
    # Our own checkpoints always used it.
    assert said not in messages(model.state_dict())


def test_pretrained_weights(tmp_path) -> None:
    """A checkpoint of a whole segmentor on another, square grid."""
    source = build(None, img_size=128)
    path = tmp_path / 'pretrained.pth'
    state = {f'backbone.{k}': v for k, v in source.state_dict().items()}
    state['decode_head.weight'] = torch.zeros(3)
    torch.save(dict(state_dict=state), path)
    target = PMVisionTransformer(
        **SMALL, init_cfg=dict(type='Pretrained', checkpoint=str(path))
    )
    target.init_weights()
    assert torch.equal(
        target.layers[1].attn.attn.in_proj_weight,
        source.layers[1].attn.attn.in_proj_weight,
    )
    del state['backbone.layers.0.ln1.weight']
    torch.save(dict(state_dict=state), path)
    with pytest.raises(RuntimeError, match='layers.0.ln1.weight: missing'):
        target.init_weights()
