"""mmpretrain's checkpoints that fit, and those that do not."""

from __future__ import annotations

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from pretrain_vits import COMPRESSION, DISTILLED, PLAIN, build, make


def test_checkpoints_compressed_and_dense() -> None:
    source, target = build(), build(dict(COMPRESSION, keep=0.9))
    target.load_state_dict(source.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(source(images)[0], target(images)[0])
    dense = build(None)
    with pytest.raises(RuntimeError, match='checkpoint and the model is den'):
        dense.load_state_dict(source.state_dict())
    tokens = target.compressor.tokens((4, 6))
    target.load_state_dict(dense.state_dict())
    assert target.compressor.tokens((4, 6)) == tokens


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (('layers.1.attn.qkv.weight', None), 'qkv.weight: missing'),
        (('ln1.bias', None), 'ln1.bias: missing'),
        (('layers.2.ffn.layers.1.bias', 5), r'bias: shape \(5,\), expected'),
        (('layers.3.ln1.bias', 24), 'layers.3.ln1.bias: unexpected'),
        (('dist_token', 24), 'dist_token: unexpected'),
    ],
)
@pytest.mark.parametrize('loader', ['torch', 'mmengine'])
def test_strict(change: tuple, message: str, loader: str) -> None:
    state = build(None).state_dict()
    key, size = change
    state.pop(key, None)
    if size:
        state[key] = torch.zeros(size)
    target = build(None)
    with pytest.raises(RuntimeError, match=message):
        if loader == 'torch':
            target.load_state_dict(state, strict=False)
        else:
            load_state_dict(target, state, strict=False)


def test_position_embeddings_are_resized() -> None:
    """As in the base class, from square grids."""
    source = build(None, img_size=64)
    stock, target = make(PLAIN), build(None)
    for model in (stock, target):
        model.load_state_dict(source.state_dict())
    assert torch.equal(target.pos_embed, stock.pos_embed)
    other = build(None, DISTILLED, img_size=64)
    with pytest.raises(RuntimeError, match='pos_embed: .*PMDistilledVision'):
        target.load_state_dict(other.state_dict())


def test_the_checkpoint_of_a_model_with_cls_token() -> None:
    target = build(None, with_cls_token=False, out_type='featmap')
    target.load_state_dict(build(None).state_dict(), strict=False)


def test_pretrained_weights(tmp_path) -> None:
    """Weights from pre-training lack the norm of the pooled features."""
    source = build(None)
    path = tmp_path / 'pretrained.pth'
    state = {f'backbone.{k}': v for k, v in source.state_dict().items()}
    torch.save(dict(state_dict={**state, 'head.x': torch.ones(1)}), path)
    for prefix in (dict(), dict(prefix='backbone.')):
        target = build(
            None,
            out_type='avg_featmap',
            final_norm=False,
            init_cfg=dict(type='Pretrained', checkpoint=str(path), **prefix),
        )
        assert torch.equal(target.pos_embed, source.pos_embed)
        assert (target.ln2.weight == 1).all()
    del state['backbone.layers.0.ln1.weight']
    torch.save(dict(state_dict=state), path)
    with pytest.raises(RuntimeError, match='layers.0.ln1.weight: missing'):
        target.init_weights()
