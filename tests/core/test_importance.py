"""Fitting what makes tokens important."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pm_seg.core import ImportanceFitter
from pm_seg.core.similarity import COMPONENTS

DIMS, TOKENS, PREFIX = 12, 60, 2


class Scored(nn.Module):
    """A block whose values have a given score, by ``<v, dL/dv>``.

    Values are one for every token, and what becomes of them is weighted by
    ``exp(<direction, layer_norm(x)>)``.

    Args:
        direction (Tensor): (C,).
        frozen (bool): Whether values depend on nothing that is trained.
    """

    def __init__(self, direction: Tensor, frozen: bool) -> None:
        super().__init__()
        self.direction = direction
        self.one = nn.Parameter(torch.ones(()), requires_grad=not frozen)
        self.tap = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        value = self.one.expand(len(x), 2, x.shape[1], 3)
        score = (F.layer_norm(x, x.shape[2:]) @ self.direction).exp()
        sign = torch.where(torch.arange(x.shape[1]) % 2 == 0, 1.0, -1.0)
        value = self.tap(value) * (score * sign)[:, None, :, None]
        return x + value.sum((1, 3), keepdim=False)[..., None]


def fit(
    directions: Tensor, batches: list[Tensor], frozen: bool = False, **options
) -> ImportanceFitter:
    blocks = [Scored(direction, frozen) for direction in directions]
    taps = [block.tap for block in blocks]
    with ImportanceFitter(blocks, taps, PREFIX, DIMS, **options) as fitter:
        for x in batches:
            # Each layer sees tokens of its own, and a loss of its own.
            sum(block(x).sum() for block in blocks).backward()
    for block in blocks:
        assert not block._forward_pre_hooks and not block.tap._forward_hooks
    return fitter


@pytest.mark.parametrize('frozen', [False, True])
def test_the_direction_of_a_log_linear_score_is_found(frozen: bool) -> None:
    """Up to the mean of the tokens' channels, which is always the same."""
    directions = 0.3 * torch.randn(3, DIMS)
    batches = [torch.randn(4, PREFIX + TOKENS, DIMS) for _ in range(2)]
    found = fit(directions, batches, frozen, ridge=1e-6).directions()
    assert found.shape == (3, DIMS) and found.dtype == torch.float32
    expected = directions - directions.mean(1, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


def test_many_channels_on_several_threads() -> None:
    """Sizes of a real model: there torch.linalg.solve failed in torch 2.14."""
    threads = torch.get_num_threads()
    blocks = [nn.Identity() for _ in range(12)]
    fitter = ImportanceFitter(blocks, blocks, PREFIX, 192)
    known = torch.randn(12, 300, 192, dtype=torch.float64)
    expected = torch.randn(12, 192, dtype=torch.float64)
    fitter.gram = known.mT @ known
    fitter.cross = (fitter.gram @ expected.unsqueeze(2)).squeeze(2)
    fitter.ridge = 0.0
    torch.set_num_threads(2)
    try:
        found, components = fitter.directions(), fitter.components()
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found, expected.float())
    assert components.shape == (12, 192, 32)


def test_components_are_where_tokens_of_an_image_differ() -> None:
    """Not where images do, or tokens from zero."""
    basis = torch.linalg.qr(torch.randn(48, 48)).Q
    own = basis[:, :COMPONENTS] - basis[:, :COMPONENTS].mean(0)
    own = torch.linalg.qr(own).Q
    block = Scored(torch.zeros(48), False)
    with ImportanceFitter([block], [block.tap], PREFIX, 48) as fitter:
        for _ in range(8):
            image = 5 * torch.randn(48)  # what all its tokens have
            tokens = torch.randn(2, PREFIX + TOKENS, COMPONENTS) @ own.T
            tokens = tokens + 0.1 * torch.randn(2, PREFIX + TOKENS, 48)
            block(image + tokens).sum().backward()
    (found,) = fitter.components()
    eye = torch.eye(COMPONENTS)
    torch.testing.assert_close(found.T @ found, eye, rtol=0, atol=1e-5)
    # Angles between the two spaces; layer norm turns tokens a little.
    assert torch.linalg.svdvals(found.T @ own).square().mean() > 0.9


def test_ridge_shrinks_what_is_found() -> None:
    directions = 0.3 * torch.randn(1, DIMS)
    batches = [torch.randn(2, PREFIX + TOKENS, DIMS)]
    norms = [
        fit(directions, batches, ridge=ridge).directions().norm()
        for ridge in (0.01, 1.0, 100.0)
    ]
    assert norms[0] > 1.5 * norms[1] > 3 * norms[2]


def test_batches_add_up_however_they_are_split() -> None:
    directions = 0.3 * torch.randn(2, DIMS)
    x = torch.randn(4, PREFIX + TOKENS, DIMS)
    whole = fit(directions, [x]).directions()
    split = fit(directions, [x[:1], x[1:]]).directions()
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)


def test_an_image_without_gradients_has_no_say() -> None:
    """As one whose pixels are all ignored."""
    directions = 0.3 * torch.randn(1, DIMS)
    x = torch.randn(1, PREFIX + TOKENS, DIMS)
    blocks = [Scored(directions[0], False)]
    kept = []
    for factors in ([1.0], [1.0, 0.0]):
        with ImportanceFitter(blocks, [blocks[0].tap], PREFIX, DIMS) as f:
            for factor in factors:
                (factor * blocks[0](x).sum()).backward()
        kept.append(f)
    assert torch.equal(kept[0].cross, kept[1].cross)
    assert kept[1].directions().isfinite().all()


def test_without_a_backward_pass_there_is_nothing_to_fit() -> None:
    blocks = [Scored(torch.zeros(DIMS), False) for _ in range(3)]
    taps = [block.tap for block in blocks]
    x = torch.randn(1, PREFIX + TOKENS, DIMS)
    with ImportanceFitter(blocks, taps, PREFIX, DIMS) as fitter:
        blocks[1](x).sum().backward()
        with torch.no_grad():
            blocks[0](x)
    with pytest.raises(RuntimeError, match=r'no gradient .* layers \[0, 2\]'):
        fitter.directions()
