"""The paper's method: tokens merge and are restored around every layer.

Mao et al., "Efficient Token Compression for Vision Transformer with Spatial
Information Preserved" (arXiv 2503.23455). The groups are by position, the same
for every image, from gradient-weighted attention scores
(:mod:`~pm_seg.core.scores`, :mod:`~pm_seg.core.structure`,
:mod:`~pm_seg.core.positional`). A :class:`~pm_seg.core.token_map.TokenMap`
merges and restores, by weights that are trained with the model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compressor import EncoderShape, Layer, Outputs, check_option, plainly
from .merging import Grid
from .positional import PositionalCompressor
from .rows import extra_of, sum_rows
from .structure import PRUNED
from .token_map import DenseTokenMap, TokenMap

MATRICES = ('sparse', 'dense')


class StaticCompressor(PositionalCompressor):
    """Merges and restores tokens by position around each compressed layer.

    On another grid than the native one the matrices are resized.

    Args:
        shape (EncoderShape): The transformer.
        keep_rate (float): Share of the patch tokens that compressed layers
            work on. Defaults to 0.7.
        prune_rate (float): Share of the patch tokens that bypass them.
            Defaults to 0 (the paper's Segmenter; 0.1 in its classifiers).
        layers (Sequence[int], optional): Layers to compress. Defaults to
            all.
        threshold (str): 'layer' or 'global', see
            :func:`~pm_seg.core.structure.count_tokens`. Defaults to 'layer'.
        decay (float): How much less the scores of each further layer count
            (the paper's classifiers: 0.025). Defaults to 0.
        matrices (str): 'sparse' for a merge and a restore weight per token,
            'dense' for full matrices, as in released checkpoints. Defaults
            to 'sparse'.
        num_groups (Sequence[int], optional): Groups of each compressed layer,
            instead of what ``keep_rate`` gives. Required for 'dense', whose
            parameter shapes depend on it.

    Raises:
        ValueError: On an unknown option or a value out of range.
    """

    def __init__(
        self,
        shape: EncoderShape,
        keep_rate: float = 0.7,
        prune_rate: float = 0.0,
        layers: Sequence[int] | None = None,
        threshold: str = 'layer',
        decay: float = 0.0,
        matrices: str = 'sparse',
        num_groups: Sequence[int] | None = None,
    ) -> None:
        check_option('matrices', matrices, MATRICES)
        super().__init__(
            shape, keep_rate, prune_rate, layers, threshold, decay, num_groups
        )
        self.dense = matrices == 'dense'
        if self.dense and not self.num_groups:
            raise ValueError(
                "matrices='dense' needs num_groups, one count for each of the "
                f'{len(self.layers)} compressed layers: the matrices are '
                'parameters and cannot change shape later'
            )
        if self.dense:
            tokens = shape.num_prefix + shape.num_tokens
            self.merge_matrix = nn.ParameterDict()
            self.restore_matrix = nn.ParameterDict()
            for layer, count in zip(self.layers, self.num_groups):
                merged, key = shape.num_prefix + count, str(layer)
                self.merge_matrix[key] = torch.zeros(merged, tokens)
                self.restore_matrix[key] = torch.zeros(tokens, merged)
        else:
            self.merge_weight = nn.Parameter(torch.zeros(self.group.shape))
            self.restore_weight = nn.Parameter(torch.zeros(self.group.shape))

    def _start(self, layer: int, merge: Tensor, restore: Tensor) -> None:
        if not self.dense:
            self.merge_weight[layer] = merge
            self.restore_weight[layer] = restore
            return
        start = self._token_map(layer, merge, restore).to_dense()
        self.merge_matrix[str(layer)].copy_(start.merge_matrix)
        self.restore_matrix[str(layer)].copy_(start.restore_matrix)

    def _macs(self, layer: int, groups: int) -> float:
        """Of a layer on so many groups: one for each value that is merged,
        and that is restored; those of the products with dense matrices.
        """
        prefix, tokens = self.shape.num_prefix, self.shape.num_tokens
        passes = 0
        if self.dense and layer in self.layers:
            passes = 2 * (prefix + groups) + 1
        elif groups < tokens:
            passes = 2
        dims = passes * self.shape.dims + (passes > 0) * self.shape.extra_dims
        return self.shape.cost(prefix + groups) + (prefix + tokens) * dims

    # ------------------------------------------------------------------ run

    def _run(
        self,
        layers: Sequence[Layer],
        x: Tensor,
        grid: Grid,
        outputs: Collection[int],
        extra: Tensor | None,
    ) -> Outputs:
        collected = {}
        for index, token_map in enumerate(self.token_maps(grid)):
            group, layer = None, layers[index]
            own = extra_of(extra, index)
            if token_map is None:
                x = plainly(layer, x, own)
            else:
                own = [self._mean(token_map, rows) for rows in own]
                z = token_map.merge(x)
                x = token_map.restore(x, plainly(layer, z, own))
            if self.observer is not None:
                if token_map is not None:
                    group = token_map.groups(self.shape.num_prefix)[None]
                self._observe(index, group, grid)
            if index in outputs:
                collected[index] = x
        return Outputs(x, collected)

    def _mean(
        self, token_map: TokenMap | DenseTokenMap, rows: Tensor
    ) -> Tensor:
        """Mean of the members of each group, (..., N, E) -> (..., K, E)."""
        prefix = self.shape.num_prefix
        group = token_map.groups(prefix)
        each = rows.reshape(-1, *rows.shape[-2:])
        live = (group >= 0).to(rows.dtype).view(1, -1, 1)
        place = group.clamp_min(0).expand(len(each), -1)
        groups = token_map.num_merged - prefix
        total = sum_rows(each * live, place, groups)
        count = sum_rows(live, place[:1], groups).clamp_min(1)
        return (total / count).view(*rows.shape[:-2], groups, -1)

    def token_maps(self, grid: Grid) -> list[TokenMap | DenseTokenMap | None]:
        """The token map of each layer, None where it runs on all tokens.

        Args:
            grid (tuple[int, int]): Patch rows and columns of the input.

        Raises:
            RuntimeError: If there is no structure yet.
        """
        self._check_ready()
        maps: list[TokenMap | DenseTokenMap | None] = [None] * self.shape.depth
        for layer in self.layers:
            key = str(layer)
            if self.dense:
                maps[layer] = DenseTokenMap(
                    self.merge_matrix[key],
                    self.restore_matrix[key],
                    self._live(layer),
                )
            elif self._counts[layer] < self.shape.num_tokens:
                maps[layer] = self._token_map(
                    layer, self.merge_weight[layer], self.restore_weight[layer]
                )
            if maps[layer] is not None and grid != self.shape.grid:
                maps[layer] = (
                    maps[layer]
                    .to_dense()
                    .resized(self.shape.num_prefix, self.shape.grid, grid)
                )
        return maps

    def _token_map(
        self, layer: int, merge: Tensor, restore: Tensor
    ) -> TokenMap:
        """Of one layer, from the weights of its patches, (N,) each."""
        prefix = self.shape.num_prefix
        group = self.group[layer]
        first = torch.arange(prefix, device=group.device)
        live = self._live(layer)
        return TokenMap(
            torch.cat([first, group.clamp_min(0) + prefix]),
            prefix + self._counts[layer],
            F.pad(merge, (prefix, 0), value=1.0) * live,
            F.pad(restore, (prefix, 0), value=1.0) * live,
            live,
        )

    def _live(self, layer: int) -> Tensor:
        """Which tokens are not pruned, bool, (P+N,)."""
        live = self.group[layer] != PRUNED
        return F.pad(live, (self.shape.num_prefix, 0), value=True)

    def extra_repr(self) -> str:
        return (
            f'grid={self.shape.grid}, keep_rate={self.keep_rate}, '
            f'prune_rate={self.prune_rate}, layers={self.layers}, '
            f'threshold={self.threshold!r}'
        )
