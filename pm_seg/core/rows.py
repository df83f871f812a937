"""Rows of tokens: taking them, and adding to them, in all images at once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def spread_rows(z: Tensor, place: Tensor) -> Tensor:
    """Row ``place`` of each image, (B, K, C) by (B, T) -> (B, T, C)."""
    return take_rows(z, rows_of(place, z.shape[1]))


def sum_rows(x: Tensor, place: Tensor, groups: int) -> Tensor:
    """Sum of the rows that go to each of K places, the transpose of
    spread_rows, (B, T, C) by int64 (B, T) -> (B, K, C)."""
    start = x.new_zeros(len(x) * groups, x.shape[2])
    into = rows_of(place, groups).flatten()
    total = add_rows(start, into, x.flatten(0, 1), len(x))
    return total.unflatten(0, (len(x), -1))


def rows_of(index: Tensor, tokens: int) -> Tensor:
    """Indices within images of so many tokens to rows of all, (B, R)."""
    batch = len(index)
    if batch > 1:
        start = torch.arange(batch, device=index.device) * tokens
        index = index + start.unsqueeze(1)
    return index


def take_rows(z: Tensor, rows: Tensor) -> Tensor:
    """Rows of all images, (B, K, C) by (B, T) -> (B, T, C)."""
    out = z.flatten(0, 1).index_select(0, rows.flatten())
    return out.unflatten(0, rows.shape)


def add_rows(
    start: Tensor, into: Tensor, update: Tensor, batch: int
) -> Tensor:
    """``start`` with ``update`` added to the rows ``into``; overwrites it.

    A sum where nothing is compiled or exported. There a product with a small
    0-1 matrix: it fuses, gives the same bits in each run, and is in every
    export format.
    """
    if not torch.compiler.is_compiling():
        return start.index_add_(0, into, update)
    start, update = (t.unflatten(0, (batch, -1)) for t in (start, update))
    rows = torch.arange(batch * start.shape[1], device=into.device)
    member = rows.view(batch, -1, 1) == into.view(batch, 1, -1)
    return (start + member.to(update.dtype) @ update).flatten(0, 1)


def extra_of(extra: Tensor | None, layer: int) -> tuple[Tensor, ...]:
    """What a layer on all tokens gets beside them: (N, E), or its part of
    (L, heads, N, E)."""
    if extra is None:
        return ()
    return (extra if extra.dim() == 2 else extra[layer],)


def full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast inside, on the device of a tensor: rounded similarities
    would pair other tokens. Entered only where there is autocast, as exports
    trace it, and meta tensors know none."""
    device = x.device.type
    if device != 'meta' and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
