"""MACs against closed forms."""

from __future__ import annotations

import pytest
import torch
from vits import build

from pm_seg.models import PMVisionTransformer
from pm_seg.utils import count_macs

DIMS, LAYERS, PATCH, TOKENS = 24, 3, 16, 24


def block_macs(tokens: int) -> int:
    """qkv + projection + 4x MLP, and the two products of attention."""
    return 12 * tokens * DIMS**2 + 2 * tokens**2 * DIMS


EMBED = TOKENS * 3 * PATCH**2 * DIMS


def run(model: PMVisionTransformer, batch: int = 1) -> int:
    images = torch.randn(batch, 3, 64, 96)
    return count_macs(lambda: model(images))


@pytest.mark.parametrize('batch', [1, 2])
def test_dense_model(batch: int) -> None:
    expected = batch * (EMBED + LAYERS * block_macs(1 + TOKENS))
    assert run(build(None), batch) == expected


@pytest.mark.parametrize('batch', [1, 2])
def test_merging_is_counted(batch: int) -> None:
    """Comparing pairs; each value that is kept, moved, added or restored.

    Sizes are one channel more.
    """
    model = build(dict(keep=0.7))
    expected, before = EMBED, TOKENS
    for after in model.compressor.tokens((4, 6)):
        expected += block_macs(1 + after)
        merged, dims = before - after, DIMS + 1
        assert merged <= before // 2
        if merged:
            expected += (before // 2) * -(-before // 2) * DIMS
            expected += (1 + after + 3 * merged) * dims
            expected += (1 + before) * DIMS
        before = after
    assert before < TOKENS
    assert run(model, batch) == batch * expected


def test_full_matrices_are_counted() -> None:
    options = dict(type='paper', matrices='dense', num_groups=[8] * LAYERS)
    expected = EMBED + LAYERS * (block_macs(9) + 2 * 9 * 25 * DIMS)
    assert run(build(options)) == expected


@pytest.mark.parametrize('prefix', [1, 2])
def test_gmacs_of_deit_tiny(prefix: int) -> None:
    """mmpretrain's layers: qkv, projection, 4x MLP, and attention itself."""
    pytest.importorskip('mmpretrain')
    from pm_seg.models.backbones import pretrain_vit

    kind = {1: 'PMVisionTransformer', 2: 'PMDistilledVisionTransformer'}
    model = getattr(pretrain_vit, kind[prefix])(arch='deit-tiny').eval()
    tokens = 196 + prefix
    layer = 12 * tokens * 192**2 + 2 * tokens**2 * 192
    images = torch.zeros(1, 3, 224, 224)
    expected = 196 * 3 * 16**2 * 192 + 12 * layer
    assert count_macs(lambda: model(images)) == expected
