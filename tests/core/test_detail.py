"""The fit of detail paths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pm_seg.core import TokenCompressor
from pm_seg.core.detail import DetailFitter

GRID, DIMS = (6, 6), 8


def compressor(**options) -> TokenCompressor:
    torch.manual_seed(0)
    options = {'keep': 0.4, 'budget': 'layer', 'detail': 4, **options}
    out = TokenCompressor(3, GRID, 1, dims=DIMS, **options)
    out.set_scores(torch.rand(3, 36) + 0.1)
    return out


class Layer(nn.Module):
    """Acts on each token alone, by a linear map of a low rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.matrix = torch.randn(DIMS, rank) @ torch.randn(rank, DIMS) / 8

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x @ self.matrix


def run_and_fit(module: TokenCompressor, layers: list, images: list) -> None:
    fitter = DetailFitter(module, layers, ridge=1e-9)
    with fitter, module.disabled():
        for x in images:
            module.run(layers, x, GRID)
    fitter.fit()


@pytest.mark.parametrize('options', [{}, {'span': 3}, {'layers': [1]}])
def test_linear_layers_are_restored_exactly(options: dict) -> None:
    module = compressor(**options)
    layers = [Layer(1) for _ in range(3)]
    images = [torch.randn(2, 37, DIMS) for _ in range(4)]
    x = images[0]
    exact = x
    for layer in layers:
        exact = layer(exact)
    before = module.run(layers, x, GRID)[0]
    assert (before - exact).norm() > 0.02 * exact.norm()
    run_and_fit(module, layers, images)
    after = module.run(layers, x, GRID)[0]
    torch.testing.assert_close(after, exact, atol=1e-4, rtol=1e-4)
    assert not any(layer._forward_hooks for layer in layers)


def test_higher_rank_is_better_and_pruned_tokens_are_left_out() -> None:
    errors = []
    layers = [Layer(6) for _ in range(3)]
    images = [torch.randn(2, 37, DIMS) for _ in range(4)]
    for rank in (1, 2, 4):
        module = compressor(detail=rank, prune=0.2, layers=[1])
        run_and_fit(module, layers, images)
        x = images[0]
        exact = x
        for layer in layers:
            exact = layer(exact)
        out = module.run(layers, x, GRID)[0]
        errors.append((out - exact).norm().item())
    assert errors[0] > errors[1] > errors[2]


def test_pruned_tokens_do_not_take_part_in_the_fit() -> None:
    layers = [Layer(6) for _ in range(3)]
    images = [torch.randn(2, 37, DIMS) for _ in range(2)]
    fits = []
    for scale in (1.0, 50.0):
        module = compressor(prune=0.2, layers=[1])
        pruned = module.group[1] == -1
        assert pruned.any()
        for x in images:
            x[:, 1:][:, pruned] *= scale
        run_and_fit(module, layers, images)
        fits.append(module.detail_down[1] @ module.detail_up[1])
    assert fits[0].norm() > 0.1
    torch.testing.assert_close(*fits)


def test_where_there_is_none() -> None:
    assert compressor(detail=0).detail == 0
    assert compressor(restore='replace').detail == 0
    assert compressor(detail=99).detail == DIMS
    with pytest.raises(ValueError, match='detail=-1 is a rank'):
        compressor(detail=-1)


def test_starts_without_effect_but_trains() -> None:
    module = compressor()
    layers = [Layer(2) for _ in range(3)]
    x = torch.randn(2, 37, DIMS)
    out = module.run(layers, x, GRID)[0]
    out.square().sum().backward()
    assert (module.detail_up == 0).all()
    assert module.detail_up.grad.abs().sum() > 0
    plain = compressor(detail=0)
    torch.testing.assert_close(out, plain.run(layers, x, GRID)[0])


def test_no_images() -> None:
    module = compressor()
    with DetailFitter(module, [Layer(1)] * 3) as fitter:
        pass
    with pytest.raises(RuntimeError, match='layer 0 saw no merged tokens'):
        fitter.fit()
