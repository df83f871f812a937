"""Watching which tokens a model groups while it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .compressor import Compressor
from .merging import Grid


class GroupRecorder:
    """Context manager that keeps the groups of the last forward pass.

    Works for every kind of compression, those whose groups depend on the
    image included.

    Args:
        compressor (Compressor): What to watch.

    Attributes:
        grid (tuple[int, int]): Patch rows and columns (h, w) of the images
            seen last, None before.
        groups (list[Tensor]): Group of each patch token in each layer, int64,
            (B, N) or (1, N), -1 if pruned; N groups where a layer runs
            on all tokens.

    Example:
        >>> with GroupRecorder(model.backbone.compressor) as recorder:
        ...     model(images, mode='tensor')
        >>> recorder.groups[3].shape
    """

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor
        self.grid: Grid | None = None
        self.groups: list[Tensor] = []

    def __enter__(self) -> GroupRecorder:
        self.compressor.observer = self._observe
        return self

    def __exit__(self, *error: object) -> None:
        self.compressor.observer = None

    def _observe(
        self, layers: tuple[int, ...], group: Tensor | None, grid: Grid
    ) -> None:
        if 0 in layers:
            self.grid, self.groups = grid, []
        if group is None:
            group = torch.arange(grid[0] * grid[1])[None]
        self.groups += [group.detach().cpu()] * len(layers)
