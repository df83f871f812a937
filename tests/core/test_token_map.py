"""Merge and restore of token maps, in their sparse and dense form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from pm_seg.core import DenseTokenMap, TokenMap, group_weights
from pm_seg.core.token_map import on_grid

#: Of 5 patches: two groups, one pruned.
GROUP = torch.tensor([1, 0, 1, -1, 0])


def make_map(prefix: int = 2) -> TokenMap:
    """N = 5, K = 2, float64."""
    scores = torch.tensor([2.0, 3.0, 4.0, 0.5, 1.5], dtype=torch.float64)
    weights = [
        F.pad(weight, (prefix, 0), value=1.0)
        for weight in group_weights(scores, GROUP)
    ]
    place = torch.cat([torch.arange(prefix), GROUP.clamp_min(0) + prefix])
    live = F.pad(GROUP >= 0, (prefix, 0), value=True)
    return TokenMap(place, prefix + 2, *weights, live)


def tokens(count: int = 7, batch: int = 2, dims: int = 3) -> torch.Tensor:
    return torch.randn(batch, count, dims, dtype=torch.float64)


def test_merge_is_a_weighted_sum() -> None:
    x = tokens()
    z = make_map().merge(x)
    assert torch.equal(z[:, :2], x[:, :2]), 'prefix tokens'
    torch.testing.assert_close(z[:, 2], x[:, 3] + 0.5 * x[:, 6])
    torch.testing.assert_close(z[:, 3], 0.5 * x[:, 2] + x[:, 4])


def test_replace_gives_each_token_its_group() -> None:
    token_map, x = make_map(), tokens()
    z = token_map.merge(x)
    y = torch.randn_like(z)
    out = token_map.restore(x, y)
    assert torch.equal(out[:, :2], y[:, :2]), 'prefix tokens'
    assert torch.equal(out[:, 5], x[:, 5]), 'the shortcut of a pruned token'
    power = 1 + 0.5**2
    torch.testing.assert_close(out[:, 3], y[:, 2] / power)
    torch.testing.assert_close(out[:, 6], 0.5 / power * y[:, 2])


def test_dense_form_does_the_same() -> None:
    token_map, x = make_map(), tokens()
    dense = token_map.to_dense()
    z = token_map.merge(x)
    y = torch.randn_like(z)
    torch.testing.assert_close(dense.merge(x), z)
    torch.testing.assert_close(dense.restore(x, y), token_map.restore(x, y))
    assert dense.num_merged == token_map.num_merged == 4


def test_groups_of_patches() -> None:
    for form in (make_map(), make_map().to_dense()):
        assert torch.equal(form.groups(2), GROUP)
    merge = torch.eye(3)[:, [0, 1, 1, 2]] + 0.01
    live = torch.tensor([True, True, True, False])
    dense = DenseTokenMap(merge, merge.T, live)
    assert dense.groups(1).tolist() == [0, 0, -1]


class Through(torch.nn.Module):
    """Merge, sine, restore."""

    def __init__(self, token_map: TokenMap) -> None:
        super().__init__()
        self.token_map = token_map

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.token_map.merge(x)
        return self.token_map.restore(x, z.sin())


def test_compiled_and_exported_as_a_product() -> None:
    """No export format lacks a product; the values are the same."""
    model, x = Through(make_map()), tokens()
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(x), model(x))
    program = torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), model(x))
    names = [str(node.target) for node in program.graph.nodes]
    assert any('matmul' in name for name in names)
    assert not any('scatter' in n or 'index_add' in n for n in names)


def test_autocast_does_not_round_merged_tokens() -> None:
    token_map = make_map()
    x = tokens().float()
    merge = torch.compile(token_map.merge, fullgraph=True, backend='eager')
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(merge(x), token_map.merge(x))
        assert merge(x).dtype == torch.float32


def test_half_precision_stays_half() -> None:
    x = tokens().bfloat16()
    for form in (make_map(), make_map().to_dense()):
        z = form.merge(x)
        assert z.dtype == form.restore(x, z).dtype == torch.bfloat16


@pytest.mark.parametrize('dense', [False, True])
def test_gradients(dense: bool) -> None:
    base = make_map()
    if dense:
        base = base.to_dense()
        names = ('merge_matrix', 'restore_matrix')
    else:
        names = ('merge_weight', 'restore_weight')
    weights = [getattr(base, name).clone().requires_grad_() for name in names]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return Through(replace(base, **dict(zip(names, weights))))(x)

    inputs = (tokens(dims=2).requires_grad_(), *weights)
    assert torch.autograd.gradcheck(run, inputs)


def test_resized_matrices_keep_constants() -> None:
    """An area average where it merges, an interpolation where it restores."""
    dense = make_map(prefix=1).to_dense()
    dense = replace(dense, live=torch.ones_like(dense.live))
    wide = on_grid(dense, 1, (1, 5), (2, 10))
    assert wide.merge_matrix.shape == (3, 21)
    assert wide.restore_matrix.shape == (21, 3) and wide.live.all()
    torch.testing.assert_close(
        wide.merge_matrix.sum(1), dense.merge_matrix.sum(1)
    )
    assert on_grid(dense, 1, (1, 5), (1, 5)) is dense
