"""Models that know nothing of pm_seg, and what compressing them gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pm_seg.engine import Measuring, describe
from pm_seg.engine.scoring import compressible_modules

ONE, FEW = Measuring(1, 1), Measuring(2, 2)


def perturbed(model: nn.Module) -> nn.Module:
    """Weights as large as trained ones: fresh ones change no token much."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(
            parameter.shape, generator=generator
        )
    return model.eval()


def timm_model(name: str = 'vit_tiny_patch16_224', **options) -> nn.Module:
    timm = pytest.importorskip('timm')
    options = (
        dict(img_size=64, embed_dim=24, depth=3, num_heads=3, num_classes=10)
        | options
    )
    return perturbed(timm.create_model(name, **options))


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64)


@torch.no_grad()
def check(dense: nn.Module, small: nn.Module, run) -> None:
    """Compressed: other outputs; disabled: those of the dense model."""
    expected, got = run(dense), run(small)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() > 1e-3 * expected.abs().max()
    ((name, module),) = compressible_modules(small).items()
    with module.compressor.disabled():
        torch.testing.assert_close(run(small), expected, rtol=1e-4, atol=1e-4)
    compressor = module.compressor
    assert compressor.compressed and name in describe(small)
    assert sum(load.kept for load in compressor.loads()) < 3 * 16
