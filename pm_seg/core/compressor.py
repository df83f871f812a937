"""The compression state of a transformer: scores, groups and weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .centres import CENTRES, select_centres, top_mask
from .structure import (
    BUILDERS,
    PRUNED,
    THRESHOLDS,
    WEIGHTS,
    Grid,
    build_groups,
    check_rates,
    check_scores,
    count_tokens,
    group_weights,
    normalise_scores,
)
from .token_map import DenseTokenMap, TokenMap, check_restore_mode

MATRICES = ('sparse', 'dense')
AnyTokenMap = TokenMap | DenseTokenMap


@dataclass(frozen=True)
class _Layout:
    """What of a structure is fixed for one grid and device.

    Attributes:
        slot (Tensor): int64, (depth, P+N), see :class:`TokenMap`.
        live (Tensor): bool, (depth, P+N).
        num_groups (tuple[int, ...]): K of each layer.
        any_pruned (tuple[bool, ...]): Whether a layer has pruned tokens.
        merge, restore (Tensor): Initial weights, (depth, N).
    """

    slot: Tensor
    live: Tensor
    num_groups: tuple[int, ...]
    any_pruned: tuple[bool, ...]
    merge: Tensor
    restore: Tensor


@dataclass(frozen=True)
class Stage:
    """Consecutive layers that run on the same tokens.

    Attributes:
        layers (tuple[int, ...]): Layer indices, ascending.
        token_map (TokenMap | DenseTokenMap, optional): Merge before the
            first and restore after the last of them; None for a layer that
            runs on all tokens.
    """

    layers: tuple[int, ...]
    token_map: AnyTokenMap | None = None


class TokenCompressor(nn.Module):
    """Holds the token maps of the compressed layers of a transformer.

    All state lives in buffers and parameters whose shapes are fixed at
    construction, so that checkpoints, optimisers, EMA and distributed
    wrappers never see a change of shape: a *structure* changes values only.
    Until scores are given (:meth:`set_scores`) or a compressed checkpoint is
    loaded there is no structure, and :meth:`stages` raises.

    For another grid than the one it was built for, the map is derived again:
    scores are resized bilinearly, each layer keeps its share of tokens, the
    builder forms new groups, and what was learned about the weights (their
    difference from the initial ones) is resized on top. Derived structures
    are cached; ``torch.compile(fullgraph=True)`` needs one eager call with a
    new grid before.

    Args:
        depth (int): Number of transformer layers.
        grid (tuple[int, int]): Patch rows and columns (h, w), N = h * w.
        num_prefix (int): P, tokens in front that are never compressed.
        keep (float): Share of patch tokens that compressed layers work on.
            Defaults to 0.7.
        prune (float): Share of patch tokens that bypass compressed layers.
            Defaults to 0 (the paper's Segmenter; 0.1 in its classifiers).
        layers (Sequence[int], optional): Layers to compress. Defaults to
            all.
        builder (str): 'row_window' (the release) or 'nearest_centre'
            (Voronoi groups in 2-D). Defaults to 'nearest_centre'.
        centres (str, optional): 'score' (the paper) or 'spread', see
            :func:`~pm_seg.core.centres.select_centres`. Defaults to 'score'
            for 'row_window' and 'spread' for 'nearest_centre'.
        score_power (float): How much scores count in 'spread'. Defaults to
            0.5.
        seed (int): Seed of 'spread'. Defaults to 0.
        thresholds (str): 'global' or 'layer', see
            :func:`~pm_seg.core.structure.count_tokens`. Defaults to
            'global'.
        decay (float): Depth decay of the scores. Defaults to 0.
        restore (str): 'residual' or 'replace', see
            :mod:`pm_seg.core.token_map`. Defaults to 'residual'.
        weights (str, optional): Initial merge weights, 'score' or 'mean'.
            Defaults to 'score' for 'replace' and 'mean' for 'residual'.
        matrices (str): 'sparse' for a merge and a restore weight per token,
            'dense' for full matrices, as in released checkpoints. Defaults
            to 'sparse'.
        span (int): Compressed layers in a row that share one token map:
            merge before the first, restore after the last. 1 merges and
            restores around every layer, as the paper does. Defaults to 1.
        num_groups (Sequence[int], optional): Groups of each compressed layer
            (of each span), instead of keep and thresholds. Required for
            'dense', whose parameter shapes depend on it.
        trainable (bool): Whether merge and restore weights are trained.
            Defaults to True.

    Raises:
        ValueError: On an unknown option or a value out of range.
    """

    max_cached_layouts = 16

    def __init__(
        self,
        depth: int,
        grid: Grid,
        num_prefix: int,
        keep: float = 0.7,
        prune: float = 0.0,
        layers: Sequence[int] | None = None,
        builder: str = 'nearest_centre',
        centres: str | None = None,
        score_power: float = 0.5,
        seed: int = 0,
        thresholds: str = 'global',
        decay: float = 0.0,
        restore: str = 'residual',
        weights: str | None = None,
        matrices: str = 'sparse',
        span: int = 1,
        num_groups: Sequence[int] | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        check_rates(keep, prune)
        for name, value, allowed in (
            ('builder', builder, tuple(BUILDERS)),
            ('centres', centres, (None, *CENTRES)),
            ('thresholds', thresholds, THRESHOLDS),
            ('weights', weights, (None, *WEIGHTS)),
            ('matrices', matrices, MATRICES),
        ):
            if value not in allowed:
                raise ValueError(
                    f'{name}={value!r} is unknown; choose one of {allowed}'
                )
        self.depth = depth
        self.grid = (int(grid[0]), int(grid[1]))
        self.num_prefix = num_prefix
        self.num_tokens = self.grid[0] * self.grid[1]
        self.keep = keep
        self.prune = prune
        self.layers = self._check_layers(layers)
        self.spans = self._make_spans(span)
        self.builder = builder
        self.centres = centres or (
            'spread' if builder == 'nearest_centre' else 'score'
        )
        self.score_power = score_power
        self.seed = seed
        self.thresholds = thresholds
        self.decay = decay
        self.mode = check_restore_mode(restore)
        self.weights = weights or (
            'mean' if restore == 'residual' else 'score'
        )
        self.matrices = matrices
        self.given_groups = self._check_num_groups(num_groups)

        shape = (depth, self.num_tokens)
        self.register_buffer('scores', torch.zeros(shape))
        self.register_buffer('group', torch.full(shape, PRUNED))
        if matrices == 'sparse':
            self.merge_weight = nn.Parameter(torch.zeros(shape))
            self.restore_weight = nn.Parameter(torch.zeros(shape))
        else:
            tokens = num_prefix + self.num_tokens
            self.merge_matrix = nn.ParameterDict()
            self.restore_matrix = nn.ParameterDict()
            for layers, count in zip(self.spans, self.given_groups):
                slots, key = num_prefix + count, str(layers[0])
                self.merge_matrix[key] = torch.zeros(slots, tokens)
                self.restore_matrix[key] = torch.zeros(tokens, slots)
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)
        self._enabled = True
        self._refresh()

    def _check_layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        if layers is None:
            return tuple(range(self.depth))
        chosen = sorted({int(i) for i in layers})
        wrong = [i for i in chosen if not 0 <= i < self.depth]
        if wrong or not chosen:
            raise ValueError(
                f'layers={list(layers)} must name at least one of the layers '
                f'0..{self.depth - 1}'
            )
        return tuple(chosen)

    def _make_spans(self, span: int) -> tuple[tuple[int, ...], ...]:
        """Compressed layers in runs of up to ``span`` consecutive ones."""
        if span < 1:
            raise ValueError(
                f'span={span} must be at least 1, the number of layers that '
                'share a token map'
            )
        spans: list[list[int]] = []
        for layer in self.layers:
            last = spans[-1] if spans else []
            if last and last[-1] == layer - 1 and len(last) < span:
                last.append(layer)
            else:
                spans.append([layer])
        return tuple(map(tuple, spans))

    def _check_num_groups(
        self, num_groups: Sequence[int] | None
    ) -> tuple[int, ...] | None:
        if num_groups is None:
            if self.matrices == 'dense':
                raise ValueError(
                    "matrices='dense' needs num_groups, one count for each "
                    f'of the {len(self.spans)} token maps: the matrices are '
                    'parameters and cannot change shape later'
                )
            return None
        counts = tuple(int(n) for n in num_groups)
        if len(counts) != len(self.spans) or not all(
            1 <= n <= self.num_tokens for n in counts
        ):
            raise ValueError(
                f'num_groups={list(num_groups)} must hold '
                f'{len(self.spans)} counts (one for each token map) in '
                f'1..{self.num_tokens}'
            )
        return counts

    # ---------------------------------------------------------------- state

    def _refresh(self) -> None:
        """Derive anew what depends on the values or device of the buffers."""
        self._layouts: OrderedDict[tuple[Grid, str], _Layout] = OrderedDict()
        self._ready = not self.group.is_meta and bool(
            (self.group != PRUNED).any()
        )
        if self._ready:
            self._layout(self.grid)

    @property
    def has_structure(self) -> bool:
        """Whether scores were given or a compressed checkpoint loaded."""
        return self._ready

    @property
    def num_groups(self) -> list[int]:
        """Groups of each layer on the native grid, N where dense."""
        return list(self._layout(self.grid).num_groups)

    @property
    def num_pruned(self) -> list[int]:
        """Pruned patch tokens of each layer on the native grid."""
        return (self.group == PRUNED).sum(1).tolist()

    @torch.no_grad()
    def set_scores(self, scores: Tensor) -> None:
        """Store scores, derive the structure, initialise the weights.

        Args:
            scores (Tensor): Gradient-weighted scores of every layer, >= 0,
                (depth, N).

        Raises:
            ValueError: On another shape, NaN, inf, or a layer of zeros.
        """
        if tuple(scores.shape) != (self.depth, self.num_tokens):
            raise ValueError(
                f'scores have shape {tuple(scores.shape)}, expected '
                f'{(self.depth, self.num_tokens)}: {self.depth} layers on a '
                f'{self.grid[0]}x{self.grid[1]} grid'
            )
        check_scores(scores[list(self.layers)])
        self.scores.copy_(scores)
        self.build()

    @torch.no_grad()
    def build(self) -> None:
        """Derive structure and initial weights from the stored scores.

        Raises:
            ValueError: If a layer would keep no token.
        """
        scores = self._normalised(self.scores.float().cpu())
        centres, live = count_tokens(
            scores, self.keep, self.prune, self.thresholds
        )
        if self.given_groups is not None:
            centres = list(self.given_groups)
        for layers, count in zip(self.spans, centres):
            if count == 0:
                raise ValueError(
                    f'layer {layers[0]} would keep none of its '
                    f'{self.num_tokens} tokens at keep={self.keep}: all its '
                    'scores are below the global threshold; raise keep, use '
                    "thresholds='layer' or leave the layer out of layers"
                )
        live = [max(pair) for pair in zip(live, centres)]
        self.set_groups(self._groups(scores, centres, live, self.grid))

    @torch.no_grad()
    def set_groups(self, group: Tensor) -> None:
        """Use the given groups and initialise the weights for them.

        Args:
            group (Tensor): Group of each token on the native grid, numbered
                0..K-1 in each layer, -1 if pruned, int64, (depth, N). Rows of
                layers that are not compressed, or not the first of their
                span, are ignored.

        Raises:
            ValueError: On another shape, a layer without groups, or a number
                of groups that contradicts ``num_groups``.
        """
        if tuple(group.shape) != tuple(self.group.shape):
            raise ValueError(
                f'group has shape {tuple(group.shape)}, expected '
                f'{tuple(self.group.shape)}'
            )
        given = group.cpu()
        group = torch.arange(self.num_tokens).repeat(self.depth, 1)
        for layers in self.spans:
            row = given[layers[0]]
            used = row.unique()
            used = used[used != PRUNED]
            if not torch.equal(used, torch.arange(len(used))) or not len(used):
                raise ValueError(
                    f'groups of layer {layers[0]} must be numbered 0..K-1 '
                    f'without gaps, K >= 1; got {used.tolist()[:8]}...'
                )
            group[list(layers)] = row
        if self.given_groups is not None:
            counts = [int(group[i[0]].max()) + 1 for i in self.spans]
            if counts != list(self.given_groups):
                raise ValueError(
                    f'the structure has {counts} groups, num_groups says '
                    f'{list(self.given_groups)}; equal scores can give more '
                    'centres than asked for'
                )
        self.group.copy_(group)
        self._refresh()
        layout = self._layout(self.grid)
        if self.matrices == 'sparse':
            self.merge_weight.copy_(layout.merge)
            self.restore_weight.copy_(layout.restore)
            return
        for layer, *_ in self.spans:
            dense = self._sparse_map(
                layout, layer, layout.merge, layout.restore
            ).to_dense()
            self.merge_matrix[str(layer)].copy_(dense.merge_matrix)
            self.restore_matrix[str(layer)].copy_(dense.restore_matrix)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    def _apply(self, *args, **kwargs) -> TokenCompressor:
        module = super()._apply(*args, **kwargs)
        self._refresh()
        return module

    # ----------------------------------------------------------------- maps

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the transformer uncompressed inside the ``with`` block."""
        previous, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = previous

    def stages(self, grid: Grid) -> list[Stage]:
        """All layers in order, with their token maps.

        Args:
            grid (tuple[int, int]): Patch rows and columns of the input.

        Raises:
            RuntimeError: If there is no structure yet.
        """
        if not self._enabled:
            return [Stage((layer,)) for layer in range(self.depth)]
        if not self.has_structure:
            raise RuntimeError(
                'compression is configured but there is no structure yet: '
                'the weights come from a dense checkpoint. Run '
                'tools/compress.py on it, train with PruneMergeHook in '
                'custom_hooks, or set compression=None for the dense model'
            )
        stages = [
            Stage((layer,))
            for layer in range(self.depth)
            if layer not in self.layers
        ]
        if self.matrices == 'dense':
            for layers in self.spans:
                stages.append(Stage(layers, self._dense_map(layers[0], grid)))
        else:
            layout = self._layout(grid)
            merge, restore = self._weights(grid)
            for layers in self.spans:
                token_map = self._sparse_map(layout, layers[0], merge, restore)
                stages.append(Stage(layers, token_map))
        return sorted(stages, key=lambda stage: stage.layers)

    def token_maps(self, grid: Grid) -> list[AnyTokenMap | None]:
        """The token map each layer runs on, None where it runs dense."""
        maps: list[AnyTokenMap | None] = [None] * self.depth
        for stage in self.stages(grid):
            for layer in stage.layers:
                maps[layer] = stage.token_map
        return maps

    def _sparse_map(
        self, layout: _Layout, layer: int, merge: Tensor, restore: Tensor
    ) -> TokenMap:
        """Map of one layer from patch-token weights, (depth, N)."""
        prefix = merge.new_ones(self.num_prefix)
        live = layout.live[layer]
        patch_live = live[self.num_prefix :]
        return TokenMap(
            slot=layout.slot[layer],
            merge_weight=torch.cat([prefix, merge[layer] * patch_live]),
            restore_weight=torch.cat([prefix, restore[layer] * patch_live]),
            num_slots=self.num_prefix + layout.num_groups[layer],
            live=live if layout.any_pruned[layer] else None,
            mode=self.mode,
        )

    def _dense_map(self, layer: int, grid: Grid) -> DenseTokenMap:
        """Trained matrices; on another grid, seen through resizing.

        There the merge reads an area average of the new grid and the restore
        is interpolated, with the same number of groups.
        """
        merge = self.merge_matrix[str(layer)]
        restore = self.restore_matrix[str(layer)]
        mask = (self.group[layer] != PRUNED).to(merge.dtype)
        if grid != self.grid:
            share = self.num_tokens / (grid[0] * grid[1])
            merge = self._resize_columns(merge, grid, share)
            restore = self._resize_columns(restore.T, grid, 1.0).T
            mask = _resize(mask[None], self.grid, grid)[0]
        live = F.pad(mask > 0.5, (self.num_prefix, 0), value=True)
        return DenseTokenMap(merge, restore, live, self.mode)

    def _resize_columns(
        self, matrix: Tensor, grid: Grid, scale: float
    ) -> Tensor:
        """(rows, P+N) -> (rows, P+N'), the patch part resized and scaled."""
        prefix, patches = matrix.split([self.num_prefix, self.num_tokens], 1)
        patches = _resize(patches, self.grid, grid) * scale
        return torch.cat([prefix, patches], 1)

    def _weights(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """Merge and restore weights for a grid, (depth, N) each.

        On another grid: the initial weights there plus, resized, what was
        learned on the native one.
        """
        if grid == self.grid:
            return self.merge_weight, self.restore_weight
        native, layout = self._layout(self.grid), self._layout(grid)
        live = native.live[:, self.num_prefix :]
        merge = (self.merge_weight - native.merge) * live
        restore = (self.restore_weight - native.restore) * live
        return (
            layout.merge + _resize(merge, self.grid, grid),
            layout.restore + _resize(restore, self.grid, grid),
        )

    def _normalised(self, scores: Tensor) -> Tensor:
        """Scores that each token map is made of, (token maps, N)."""
        rows = normalise_scores(
            scores[list(self.layers)], self.decay, self.layers
        )
        sizes = [len(layers) for layers in self.spans]
        return torch.stack([part.mean(0) for part in rows.split(sizes)])

    def _groups(
        self,
        scores: Tensor,
        centres: Sequence[int],
        live: Sequence[int],
        grid: Grid,
    ) -> Tensor:
        """Groups of all layers from the scores of the token maps."""
        alive = torch.stack([top_mask(row, n) for row, n in zip(scores, live)])
        chosen = select_centres(
            scores,
            centres,
            alive,
            grid,
            self.centres,
            self.score_power,
            self.seed,
        )
        group = torch.arange(grid[0] * grid[1]).repeat(self.depth, 1)
        for row, layers in enumerate(self.spans):
            group[list(layers)] = build_groups(
                chosen[row], alive[row], grid, self.builder
            )
        return group

    def _layout(self, grid: Grid) -> _Layout:
        layout = self._layouts.get((grid, str(self.group.device)))
        return layout or self._derive_layout(grid)

    @torch.compiler.disable
    @torch.no_grad()
    def _derive_layout(self, grid: Grid) -> _Layout:
        device = self.group.device
        group, scores = self.group.cpu(), self.scores.float().cpu()
        if grid != self.grid:
            if not (scores[list(self.layers)] > 0).any(1).all():
                raise RuntimeError(
                    f'no token map for a {grid[0]}x{grid[1]} grid can be '
                    f'derived from the {self.grid[0]}x{self.grid[1]} one: '
                    'its groups were set without scores. Call set_scores, '
                    'or resize images to the native size'
                )
            native = self._layout(self.grid)
            share = grid[0] * grid[1] / self.num_tokens
            total = grid[0] * grid[1]
            scores = _resize(scores, self.grid, grid)
            centres, live = [], []
            for layer, *_ in self.spans:
                count = round(native.num_groups[layer] * share)
                centres.append(min(max(count, 1), total))
                alive = int((group[layer] != PRUNED).sum())
                live.append(min(max(round(alive * share), centres[-1]), total))
            group = self._groups(self._normalised(scores), centres, live, grid)
        layout = self._make_layout(group, scores, device)
        self._layouts[grid, str(device)] = layout
        while len(self._layouts) > self.max_cached_layouts:
            self._layouts.popitem(last=False)
        return layout

    def _make_layout(
        self, group: Tensor, scores: Tensor, device: torch.device
    ) -> _Layout:
        weights = [
            group_weights(row, members, self.weights)
            for row, members in zip(scores, group)
        ]
        live = group != PRUNED
        prefix = torch.arange(self.num_prefix).expand(self.depth, -1)
        slot = torch.cat([prefix, group.clamp_min(0) + self.num_prefix], dim=1)
        live = torch.cat([torch.ones_like(prefix, dtype=torch.bool), live], 1)
        return _Layout(
            slot=slot.to(device),
            live=live.to(device),
            num_groups=tuple((group.amax(1) + 1).tolist()),
            any_pruned=tuple((~live).any(1).tolist()),
            merge=torch.stack([m for m, _ in weights]).to(device),
            restore=torch.stack([r for _, r in weights]).to(device),
        )

    def extra_repr(self) -> str:
        return (
            f'grid={self.grid}, keep={self.keep}, prune={self.prune}, '
            f'layers={list(self.layers)}, builder={self.builder!r}, '
            f'restore={self.mode!r}, matrices={self.matrices!r}'
        )


def _resize(rows: Tensor, old: Grid, new: Grid) -> Tensor:
    """Bilinear resize of per-token values, (R, h*w) -> (R, h'*w')."""
    maps = rows.reshape(1, -1, *old)
    maps = F.interpolate(maps, size=new, mode='bilinear', align_corners=False)
    return maps.reshape(rows.shape[0], -1)
