"""ToMe and ALGM."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pm_seg.core import MergingCompressor
from pm_seg.core.merging import match, match_windows, pool


def plain_matching(metric: torch.Tensor, count: int) -> set:
    """Pairs of tokens that merge, one image, written as loops."""
    unit = F.normalize(metric, dim=-1)
    best = []
    for i in range(0, len(unit), 2):
        scores = {j: float(unit[i] @ unit[j]) for j in range(1, len(unit), 2)}
        partner = max(scores, key=scores.get)
        best.append((scores[partner], i, partner))
    best.sort(reverse=True)
    return {(i, j) for _, i, j in best[:count]}


@given(st.integers(3, 20), st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_match(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, tokens, 4, generator=generator).double()
    for count in range(tokens // 2 + 1):
        position = match(metric, count)
        for row, image in zip(position, metric):
            assert row.unique().tolist() == list(range(tokens - count))
            expected = plain_matching(image, count)
            assert all(row[i] == row[j] for i, j in expected)


def test_windows_of_equal_tokens_merge_first() -> None:
    grid = (5, 7)
    x = torch.randn(2, *grid, 3)
    x[0, 2:4, 4:6] = torch.randn(3)
    x[1, 0:2, 0:2] = torch.randn(3)
    position = match_windows(x.flatten(1, 2), grid, 1).view(2, *grid)
    assert (position[0, 2:4, 4:6] == 0).all()
    assert (position[1, 0:2, 0:2] == 0).all()
    for row in position.flatten(1):
        assert row.unique().tolist() == list(range(35 - 3))
    most = match_windows(x.flatten(1, 2), grid, 6)
    assert (most.flatten().bincount()[:6] == 8).all()


def test_pool_weights_by_size() -> None:
    x = torch.tensor([[[1.0], [3.0], [10.0]]])
    size = torch.tensor([[[1.0], [3.0], [1.0]]])
    merged, sizes = pool(x, size, torch.tensor([[0, 0, 1]]), 2)
    assert merged.flatten().tolist() == [2.5, 10.0]
    assert sizes.flatten().tolist() == [4.0, 1.0]


class Layer(nn.Module):
    """Mean attention and no MLP; counts its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.biases: list = []

    def attend(self, x, key_bias=None):
        self.seen.append(x.shape[1])
        self.biases.append(key_bias)
        return x, x.unsqueeze(1)

    def feed_forward(self, x):
        return x

    def forward(self, x):
        return x


@pytest.mark.parametrize('method', ['tome', 'algm'])
@pytest.mark.parametrize('keep', [0.9, 0.7, 0.5])
def test_map_stays_whole(method: str, keep: float) -> None:
    module = MergingCompressor(8, (7, 9), 2, keep=keep, method=method)
    layers = [Layer() for _ in range(8)]
    x = torch.randn(3, 65, 5)
    out, collected = module.run(layers, x, (7, 9), outputs=(0, 7))
    assert out.shape == collected[0].shape == x.shape
    torch.testing.assert_close(collected[7], out)
    assert torch.equal(out[:, :2], x[:, :2])
    after = module.tokens_after((7, 9))
    assert [layer.seen[0] for layer in layers] == [
        65, *(n + 2 for n in after[:-1])
    ]  # fmt: skip
    assert sum(after) / 8 / 63 == pytest.approx(keep, abs=0.03)
    biased = [layer.biases[0] is not None for layer in layers]
    assert biased == [method == 'tome' and n < 65 for n in
                      (layer.seen[0] for layer in layers)]  # fmt: skip
    for layer in layers:  # a token counts as often as it has patches
        if layer.biases[0] is not None:
            count = layer.biases[0].exp()
            assert (count[..., :2] == 1).all() and (count >= 1).all()
            patches = count[..., 2:].sum(-1)
            torch.testing.assert_close(patches, torch.full((3, 1, 1), 63.0))
    # Averages weighted by size keep the mean of the image.
    torch.testing.assert_close(out[:, 2:].mean(1), x[:, 2:].mean(1))
    with module.disabled():
        assert module.run(layers, x, (7, 9))[0] is x


def test_equal_tokens_merge_without_loss() -> None:
    x = torch.randn(1, 4, 6).repeat_interleave(4, 1)
    x = x.view(1, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(1, 16, 6)
    module = MergingCompressor(1, (4, 4), 0, keep=0.6)
    assert not torch.equal(x[:, 0], x[:, 2])
    torch.testing.assert_close(module.run([Layer()], x, (4, 4))[0], x)
    assert module.tokens_after((4, 4)) == [10]


def test_schedule_is_in_the_checkpoint() -> None:
    module = MergingCompressor(6, (8, 8), 1, keep=0.5)
    assert not module.has_structure
    module.build()
    other = MergingCompressor(6, (8, 8), 1, keep=0.9)
    other.load_state_dict(module.state_dict())
    assert other.tokens_after((8, 8)) == module.tokens_after((8, 8))


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="method='x' is unknown"):
        MergingCompressor(4, (4, 4), 1, method='x')
    with pytest.raises(ValueError, match='keep=0 is not in'):
        MergingCompressor(4, (4, 4), 1, keep=0)
    with pytest.raises(ValueError, match="'algm' needs two layers"):
        MergingCompressor(1, (4, 4), 1, method='algm')
    with pytest.raises(ValueError, match="'tome' cannot work on keep=0.05"):
        MergingCompressor(2, (4, 4), 1, keep=0.05).build()
