"""MACs against closed forms."""

from __future__ import annotations

import importlib

import pytest
import torch

from pm_seg.models import PMVisionTransformer
from pm_seg.utils import count_macs

DIMS, LAYERS, HEADS, PATCH = 24, 3, 3, 16


def backbone(compression: dict | None) -> PMVisionTransformer:
    model = PMVisionTransformer(
        img_size=64,
        patch_size=PATCH,
        embed_dims=DIMS,
        num_layers=LAYERS,
        num_heads=HEADS,
        compression=compression,
    )
    if compression:
        compressor = model.compressor
        compressor.set_scores(torch.rand_like(compressor.scores) + 0.1)
    return model.eval()


def block_macs(tokens: int) -> int:
    """qkv + projection + 4x MLP, and the two products of attention."""
    return 12 * tokens * DIMS**2 + 2 * tokens**2 * DIMS


EMBED = 16 * 3 * PATCH**2 * DIMS


@pytest.mark.parametrize('batch', [1, 2])
def test_dense_model(batch: int) -> None:
    model = backbone(None)
    images = torch.randn(batch, 3, 64, 64)
    expected = batch * (EMBED + LAYERS * block_macs(17))
    assert count_macs(lambda: model(images)) == expected


@pytest.mark.parametrize(
    ('restore', 'detail'), [('replace', 0), ('residual', 0), ('residual', 4)]
)
def test_sparse_maps_are_counted(restore: str, detail: int) -> None:
    """Merge and restore N C each; detail paths down and up, N and K."""
    model = backbone(
        dict(
            keep=0.5,
            layers=[1, 2],
            restore=restore,
            detail=detail,
            adapt=0,
        )
    )
    path = detail * 2 * (17 + 9) * DIMS
    expected = EMBED + block_macs(17)
    expected += 2 * (block_macs(1 + 8) + 2 * 17 * DIMS + path)
    images = torch.randn(1, 3, 64, 64)
    assert count_macs(lambda: model(images)) == expected


@pytest.mark.parametrize('rounds', [1, 3])
def test_adaptive_maps_are_counted(rounds: int) -> None:
    """Sums of seeds, comparisons, choice, sums of rounds, sizes on top."""
    options = dict(keep=0.5, layers=[1, 2], detail=0, adapt=rounds)
    model = backbone(options)
    find = 17 * DIMS + rounds * 16 * (9 * DIMS + 1) + 17
    find += (rounds - 1) * 16 * DIMS
    own = 2 * 17 * DIMS + find
    expected = EMBED + block_macs(17) + 2 * (block_macs(1 + 8) + own)
    images = torch.randn(1, 3, 64, 64)
    assert count_macs(lambda: model(images)) == expected
    assert model.compressor.map_macs(8) == own


@pytest.mark.parametrize('rounds', [1, 3])
def test_the_count_does_not_depend_on_the_device(
    rounds: int, monkeypatch
) -> None:
    """Products with 0-1 matrices, of accelerators, are counted as sums."""
    model = backbone(dict(keep=0.5, layers=[1, 2], adapt=rounds))
    images = torch.randn(1, 3, 64, 64)
    expected = count_macs(lambda: model(images))
    module = importlib.import_module('pm_seg.core.segments')
    monkeypatch.setattr(module, '_use_bags', lambda x: False)
    assert count_macs(lambda: model(images)) == expected
    assert not module.counting()


def test_dense_matrices_are_counted() -> None:
    model = backbone(
        dict(matrices='dense', num_groups=[8, 8, 8], restore='replace')
    )
    expected = EMBED + LAYERS * (block_macs(9) + 2 * 9 * 17 * DIMS)
    images = torch.randn(1, 3, 64, 64)
    assert count_macs(lambda: model(images)) == expected
