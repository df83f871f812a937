"""Watching which tokens a model groups while it runs."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from .base import Compressor
from .structure import PRUNED, Grid
from .token_map import (
    DenseTokenMap,
    ImageMap,
    TokenMap,
)


def patch_groups(
    token_map: TokenMap | DenseTokenMap | ImageMap, num_prefix: int
) -> Tensor:
    """Group of each patch token, as the builder numbered them.

    Args:
        token_map: A map that is bound to its tokens.
        num_prefix (int): P.

    Returns:
        Tensor: int64, (1, N), or (B, N) if groups differ between images; -1
        for pruned tokens. In a map of full matrices a token is in the group
        that reads most of it.
    """
    if isinstance(token_map, ImageMap):
        return token_map.position[:, num_prefix:] - num_prefix
    if isinstance(token_map, DenseTokenMap):
        patches = token_map.merge_matrix[num_prefix:, num_prefix:]
        group = patches.abs().argmax(0)
    else:
        slot = token_map.slot[num_prefix:]
        group = token_map.segments.given[slot] - num_prefix
    if token_map.live is not None:
        group = torch.where(token_map.live[num_prefix:], group, PRUNED)
    return group[None]


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
            dense. For merging without restoration, the groups after the
            layer's merge.

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

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.compressor.observer = None

    def _observe(
        self, layers: tuple[int, ...], group: Tensor | None, grid: Grid
    ) -> None:
        if 0 in layers:
            self.grid, self.groups = grid, []
        if group is None:
            group = torch.arange(grid[0] * grid[1])[None]
        self.groups += [group.detach().cpu()] * len(layers)
