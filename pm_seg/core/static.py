"""Groups by position, the same for every image: the paper's method.

Mao et al., "Efficient Token Compression for Vision Transformer with Spatial
Information Preserved" (arXiv 2503.23455). Around each compressed layer, tokens
are merged and restored by a :class:`~pm_seg.core.token_map.TokenMap`, whose
groups follow from gradient-weighted attention scores
(:mod:`~pm_seg.core.scores`, :mod:`~pm_seg.core.positional`) and whose weights
are trained with the model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from .compressor import EncoderShape, Layer, Outputs
from .merging import RESTORES, Grid
from .positional import PositionalCompressor, check_option
from .structure import WEIGHTS, resize_groups
from .token_map import (
    DenseTokenMap,
    Structure,
    TokenMap,
    make_structure,
    resize_rows,
)

MATRICES = ('sparse', 'dense')


class StaticCompressor(PositionalCompressor):
    """Merges and restores tokens by position around each compressed layer.

    On another grid than the native one, scores are resized bilinearly, each
    layer keeps its share of tokens, and what was learned about the weights
    (their difference from the initial ones) is resized on top; dense matrices
    are resized themselves. Structures of some grids are kept, and
    ``torch.compile(fullgraph=True)`` needs one eager call with a new one.

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
        restore (str): 'replace' (the paper) or 'residual', see
            :mod:`~pm_seg.core.token_map`. Defaults to 'replace'.
        weights (str): Initial merge weights, 'score' (the paper) or 'mean'.
            Defaults to 'score'.
        matrices (str): 'sparse' for a merge and a restore weight per token,
            'dense' for full matrices, as in released checkpoints. Defaults
            to 'sparse'.
        num_groups (Sequence[int], optional): Groups of each compressed layer,
            instead of what ``keep_rate`` gives. Required for 'dense', whose
            parameter shapes depend on it.
        trainable (bool): Whether the weights are trained. Defaults to True.

    Raises:
        ValueError: On an unknown option or a value out of range.
    """

    #: Structures of so many other grids are kept.
    max_grids = 16

    def __init__(
        self,
        shape: EncoderShape,
        keep_rate: float = 0.7,
        prune_rate: float = 0.0,
        layers: Sequence[int] | None = None,
        threshold: str = 'layer',
        decay: float = 0.0,
        restore: str = 'replace',
        weights: str = 'score',
        matrices: str = 'sparse',
        num_groups: Sequence[int] | None = None,
        trainable: bool = True,
    ) -> None:
        check_option('restore', restore, RESTORES)
        check_option('weights', weights, WEIGHTS)
        check_option('matrices', matrices, MATRICES)
        super().__init__(
            shape, keep_rate, prune_rate, layers, threshold, decay, num_groups
        )
        if matrices == 'dense' and num_groups is None:
            raise ValueError(
                "matrices='dense' needs num_groups, one count for each of the "
                f'{len(self.layers)} compressed layers: the matrices are '
                'parameters and cannot change shape later'
            )
        self.residual = restore == 'residual'
        self.weights = weights
        self.dense = matrices == 'dense'
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
        self.requires_grad_(trainable)
        self._refresh()

    # ---------------------------------------------------------------- state

    def _refresh(self) -> None:
        super()._refresh()
        self._structures: dict[tuple[Grid, str], Structure] = {}
        if self.has_structure:
            self._structure(self.shape.grid)

    @torch.no_grad()
    def _reset(self) -> None:
        native = self._structure(self.shape.grid)
        if not self.dense:
            self.merge_weight.copy_(native.merge)
            self.restore_weight.copy_(native.restore)
            return
        for layer in self.layers:
            start = native.token_map(layer, native.merge, native.restore)
            start = start.to_dense()
            self.merge_matrix[str(layer)].copy_(start.merge_matrix)
            self.restore_matrix[str(layer)].copy_(start.restore_matrix)

    def _map_macs(self, groups: int) -> float:
        """One for each value that is merged, and that is restored or bypasses
        the layer; those of the products with dense matrices.
        """
        prefix, tokens = self.shape.num_prefix, self.shape.num_tokens
        if self.dense:
            passes = 2 * (prefix + groups) + 1
        else:
            passes = 2 if groups < tokens else 0
        return passes * (prefix + tokens) * self.shape.dims

    # ------------------------------------------------------------------ run

    def _run(
        self,
        layers: Sequence[Layer],
        x: Tensor,
        grid: Grid,
        outputs: Collection[int],
    ) -> Outputs:
        collected = {}
        for index, token_map in enumerate(self.token_maps(grid)):
            group = None
            if token_map is None:
                x = layers[index](x)
            else:
                z = token_map.merge(x)
                x = token_map.restore(x, z, layers[index](z))
            if self.observer is not None:
                if token_map is not None:
                    group = token_map.groups(self.shape.num_prefix)[None]
                self._observe(index, group, grid)
            if index in outputs:
                collected[index] = x
        return Outputs(x, collected)

    def token_maps(self, grid: Grid) -> list[TokenMap | DenseTokenMap | None]:
        """The token map of each layer, None where it runs on all tokens.

        Args:
            grid (tuple[int, int]): Patch rows and columns of the input.

        Raises:
            RuntimeError: If there is no structure yet, or none for this grid
                can be derived.
        """
        self._check_ready()
        maps = self._dense_maps(grid) if self.dense else self._maps(grid)
        return [maps.get(layer) for layer in range(self.shape.depth)]

    def _maps(self, grid: Grid) -> dict[int, TokenMap]:
        structure = self._structure(grid)
        merge, restore = self.merge_weight, self.restore_weight
        if grid != self.shape.grid:
            native = self._structure(self.shape.grid)
            merge, restore = structure.carry_over(
                native, (merge, restore), self.shape.grid, grid
            )
        # With as many groups as tokens it is the layer alone.
        return {
            layer: structure.token_map(layer, merge, restore, self.residual)
            for layer in self.layers
            if structure.counts[layer] < grid[0] * grid[1]
        }

    def _dense_maps(self, grid: Grid) -> dict[int, DenseTokenMap]:
        native, maps = self._structure(self.shape.grid), {}
        for layer in self.layers:
            maps[layer] = DenseTokenMap(
                self.merge_matrix[str(layer)],
                self.restore_matrix[str(layer)],
                native.live[layer],
                self.residual,
            )
            if grid != self.shape.grid:
                maps[layer] = maps[layer].resized(
                    self.shape.num_prefix, self.shape.grid, grid
                )
        return maps

    def _structure(self, grid: Grid) -> Structure:
        key = (grid, str(self.group.device))
        return self._structures.get(key) or self._derive(grid)

    @torch.compiler.disable
    @torch.inference_mode(False)
    @torch.no_grad()
    def _derive(self, grid: Grid) -> Structure:
        native, rows = self.shape.grid, list(self.layers)
        group, scores = self.group.cpu(), self.scores[rows].cpu()
        if grid != native:
            if not self.has_scores:
                raise RuntimeError(
                    f'no token map for a {grid[0]}x{grid[1]} grid can be '
                    f'derived from the {native[0]}x{native[1]} one: its '
                    'groups were set without scores. Call set_scores, or '
                    'resize images to the native size'
                )
            scores = resize_rows(scores, native, grid)
        scores = self._normalised(scores)
        if grid != native:
            group = resize_groups(group[rows], scores, grid)
            group = self._all_layers(group)
        structure = make_structure(
            group,
            scores,
            self.layers,
            self.weights,
            self.shape.num_prefix,
            self.group.device,
        )
        others = [key for key in self._structures if key[0] != native]
        if len(others) == self.max_grids:
            del self._structures[others[0]]
        self._structures[grid, str(self.group.device)] = structure
        return structure

    def extra_repr(self) -> str:
        return (
            f'grid={self.shape.grid}, keep_rate={self.keep_rate}, '
            f'prune_rate={self.prune_rate}, layers={list(self.layers)}, '
            f'threshold={self.threshold!r}, '
            f'restore={"residual" if self.residual else "replace"!r}'
        )
