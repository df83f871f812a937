"""Layer-wise learning rates."""

from __future__ import annotations

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from pm_seg.engine.optimizers import layer_index
from pm_seg.models import PMVisionTransformer


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = PMVisionTransformer(
            img_size=32,
            embed_dims=12,
            num_layers=3,
            num_heads=3,
            final_norm=True,
            compression=dict(type='paper'),
        )
        self.decode_head = nn.Linear(12, 2)


def build(**paramwise):
    init_default_scope('mmseg')
    return build_optim_wrapper(
        Model(),
        dict(
            constructor='PMLayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.1),
            paramwise_cfg=paramwise,
        ),
    )


@pytest.mark.parametrize(
    ('name', 'index'),
    [
        ('backbone.pos_embed', 0),
        ('backbone.patch_embed.projection.weight', 0),
        ('backbone.layers.0.ln1.weight', 1),
        ('backbone.layers.11.ffn.layers.1.bias', 12),
        ('backbone.ln1.weight', 13),
        ('decode_head.cls_emb', 13),
    ],
)
def test_layer_index(name: str, index: int) -> None:
    assert layer_index(name, 12) == index


def test_rates_and_weight_decay() -> None:
    wrapper = build(decay_rate=0.5, compressor_lr_mult=3.0)
    seen: dict[int, tuple[float, float]] = {}
    for group in wrapper.optimizer.param_groups:
        for parameter in group['params']:
            assert id(parameter) not in seen
            seen[id(parameter)] = (group['lr'], group['weight_decay'])
    rates = sorted({lr for lr, _ in seen.values()})
    assert rates == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 3]
    total = sum(len(g['params']) for g in wrapper.optimizer.param_groups)
    assert total == len(list(Model().parameters()))
    tensors = [p for g in wrapper.optimizer.param_groups for p in g['params']]
    weights = [seen[id(p)] for p in tensors if p.shape == (3, 4)]
    assert weights == [(3.0, 0.0)] * 2, 'merge and restore weights'
    matrices = [seen[id(p)] for p in tensors if p.shape == (36, 12)]
    assert sorted(matrices) == [(1 / 8, 0.1), (1 / 4, 0.1), (1 / 2, 0.1)]
    assert all(seen[id(p)][1] == 0 for p in tensors if p.dim() == 1)


def test_needs_a_rate() -> None:
    with pytest.raises(ValueError, match='needs decay_rate'):
        build()


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.backbone.requires_grad_(False)
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='PMLayerDecayOptimWrapperConstructor',
            optimizer=dict(type='SGD', lr=1.0),
            paramwise_cfg=dict(decay_rate=0.5),
        ),
    )
    assert sum(len(g['params']) for g in wrapper.optimizer.param_groups) == 2
    assert isinstance(wrapper.optimizer, torch.optim.SGD)
