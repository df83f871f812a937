"""A small transformer in plain torch, for compressors to run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pm_seg.core import (
    Compressor,
    EncoderShape,
    LayerCost,
    StaticCompressor,
    make_compressor,
)
from pm_seg.core.merging import Grid

#: As configs write it, for each kind there is.
KINDS = {
    'pm': dict(keep=0.6),
    'paper': dict(type='paper', keep_rate=0.5, prune_rate=0.1),
    'tome': dict(type='tome', keep=0.6),
    'algm': dict(type='algm', keep=0.7),
}

#: What :func:`paper_compressor` is for: 24 patches, their MLPs cost all.
PAPER_SHAPE = EncoderShape(3, (4, 6), 1, 4, 2, LayerCost(0.0, 16.0, 0.0))


class Block(nn.Module):
    """A layer with its attention written out, see :class:`pm_seg.core.Layer`.

    Args:
        dims (int): C.
        heads (int): Of attention.
    """

    def __init__(self, dims: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dims, 3 * dims)
        self.project = nn.Linear(dims, dims)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dims),
            nn.Linear(dims, 4 * dims),
            nn.GELU(),
            nn.Linear(4 * dims, dims),
        )
        self.norm = nn.LayerNorm(dims)

    def attend(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = q @ k.mT * q.shape[3] ** -0.5
        if log_size is not None:
            logits = logits + log_size[:, None, None].to(logits.dtype)
        out = (logits.softmax(3) @ v).transpose(1, 2).flatten(2)
        return x + self.project(out)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)

    def mean_keys(self, x: Tensor) -> Tensor:
        weight = self.qkv.weight.chunk(3)[1]
        key = weight.unflatten(0, (self.heads, -1)).mean(0)
        return F.linear(self.norm(x), key)

    def forward(self, x: Tensor, log_size: Tensor | None = None) -> Tensor:
        return self.feed_forward(self.attend(x, log_size))


def shape_of(
    depth: int = 4,
    grid: Grid = (4, 6),
    num_prefix: int = 1,
    dims: int = 24,
    heads: int = 3,
) -> EncoderShape:
    """Sizes and costs of ``depth`` blocks."""
    cost = LayerCost(4 * dims**2, 8 * dims**2, 2 * dims)
    return EncoderShape(depth, grid, num_prefix, dims, dims // heads, cost)


def make_layers(shape: EncoderShape, seed: int = 0) -> nn.ModuleList:
    """Blocks whose attention and MLP change tokens a lot."""
    torch.manual_seed(seed)
    layers = nn.ModuleList(
        Block(shape.dims, shape.dims // shape.key_dims)
        for _ in range(shape.depth)
    )
    for name, parameter in layers.named_parameters():
        if 'norm' not in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return layers


def make(
    compression: dict, shape: EncoderShape | None = None, seed: int = 0
) -> tuple[nn.ModuleList, Compressor]:
    """Blocks and a compressor that is ready to run."""
    shape = shape or shape_of()
    compressor = make_compressor(compression, shape)
    if compressor.needs_scores:
        torch.manual_seed(seed)
        scores = torch.rand(shape.depth, shape.num_tokens) + 0.01
        compressor.set_scores(scores)
    return make_layers(shape, seed), compressor


def paper_compressor(
    scores: bool = True, shape: EncoderShape = PAPER_SHAPE, **options
) -> StaticCompressor:
    """The paper's, with random scores unless it is to have none."""
    torch.manual_seed(1)
    out = StaticCompressor(shape, **{'keep_rate': 0.5, **options})
    if scores:
        out.set_scores(torch.rand(shape.depth, shape.num_tokens) + 0.01)
    return out


def kept(module: Compressor) -> list[int]:
    """Patch tokens that the MLP of each layer works on."""
    return [load.kept for load in module.loads()]
