"""The compression state of a transformer: scores, groups and weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch.utils.checkpoint as cp
from torch import Tensor, nn

from .base import Compressor, LayerOutputs
from .budget import BUDGETS, LEVELS, allocate
from .centres import CENTRES, select_centres, top_mask
from .matching import NEIGHBOURS, neighbours, sketch_dims
from .observe import patch_groups
from .segments import Segments, make_segments
from .structure import (
    BUILDERS,
    PRUNED,
    WEIGHTS,
    Grid,
    build_groups,
    check_rates,
    check_scores,
    count_tokens,
    group_weights,
    normalise_scores,
)
from .token_map import (
    AdaptiveMap,
    DenseTokenMap,
    SimilarityMap,
    TokenMap,
    check_restore_mode,
)

MATRICES = ('sparse', 'dense')
AnyTokenMap = TokenMap | DenseTokenMap | SimilarityMap | AdaptiveMap
MATCHING = 'matching'
ADAPT = 1


@dataclass(frozen=True)
class _Layout:
    """What of a structure is fixed for one grid and device.

    Attributes:
        segments (tuple[Segments, ...]): Groups of each layer's tokens.
        live (Tensor): bool, (depth, P+N).
        num_groups (tuple[int, ...]): K of each layer.
        any_pruned (tuple[bool, ...]): Whether a layer has pruned tokens.
        merge, restore (Tensor): Initial weights, (depth, N).
        size (Tensor, optional): Of each token's group, (depth, P+N). For
            groups that follow the image, whose own size is divided by when
            they merge.
        candidates (tuple[Tensor, ...]): Groups that each token of a layer
            can go to, (N, 9); none for static groups.
    """

    segments: tuple[Segments, ...]
    live: Tensor
    num_groups: tuple[int, ...]
    any_pruned: tuple[bool, ...]
    merge: Tensor
    restore: Tensor
    size: Tensor | None
    candidates: tuple[Tensor, ...]


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


class TokenCompressor(Compressor):
    """Holds the token maps of the compressed layers of a transformer.

    All state lives in buffers and parameters whose shapes are fixed at
    construction, so that checkpoints, optimisers, EMA and distributed
    wrappers never see a change of shape: a *structure* changes values only.
    Until scores are given (:meth:`set_scores`) or a compressed checkpoint is
    loaded there is no structure, and :meth:`stages` raises.

    A layer whose budget is all tokens has no token map at all.

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
        keep (float): Share of patch tokens that compressed layers work on;
            with budget='loss' the layers cost together what they would if
            each worked on this share. Defaults to 0.7.
        prune (float): Share of patch tokens that bypass compressed layers.
            Defaults to 0 (the paper's Segmenter; 0.1 in its classifiers).
        layers (Sequence[int], optional): Layers to compress. Defaults to
            all.
        builder (str): 'row_window' (the release), 'nearest_centre' (Voronoi
            groups in 2-D), or 'matching': groups of similar tokens, found
            anew in each image by bipartite matching, without scores or
            trainable merge and restore weights. Defaults to
            'nearest_centre'.
        adapt (int, optional): Times that the tokens of each image move to
            the group they are most similar to, see
            :class:`~pm_seg.core.token_map.AdaptiveMap`; 0 for the same
            groups in all images. Needs ``dims``, residual restores of sparse
            maps, weights='mean' and prune=0; defaults to 1 with these and
            'nearest_centre', else to 0.
        centres (str, optional): 'score' (the paper) or 'spread', see
            :func:`~pm_seg.core.centres.select_centres`. Defaults to 'score'
            for 'row_window' and 'spread' for 'nearest_centre'.
        score_power (float): How much scores count in 'spread'. Defaults to
            1.
        seed (int): Seed of 'spread'. Defaults to 0.
        rotate (bool): Whether the centres of 'spread' change from layer to
            layer, so that no token is merged everywhere. Defaults to True.
        budget (str, optional): What decides how many tokens each layer
            keeps. 'loss': the measured effect of compressing it, see
            :mod:`pm_seg.core.budget`. 'global' or 'layer': thresholds on the
            scores, see :func:`~pm_seg.core.structure.count_tokens`. Defaults
            to 'loss' where losses were given, which
            :func:`pm_seg.engine.compress` sees to, else to 'layer'.
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
            (of each span), instead of keep and budget. Required for
            'dense', whose parameter shapes depend on it.
        detail (int): Rank of the detail path of 'residual' restores, see
            :mod:`pm_seg.core.token_map`; 0 for none. Needs ``dims`` and
            sparse matrices, else there is none. Defaults to 16.
        trainable (bool): Whether the weights of the token maps are trained.
            Defaults to True.
        checkpoint (bool): Whether restores are computed again in the backward
            pass instead of kept. Defaults to False.
        dims (int, optional): C, channels of a token.
        layer_cost (tuple[float, float]): a and b of the multiply-accumulates
            ``a T + b T^2`` of a layer on T tokens. Defaults to (1, 0).

    Raises:
        ValueError: On an unknown option or a value out of range.
    """

    max_cached_layouts = 16
    uses_scores = True

    def __init__(
        self,
        depth: int,
        grid: Grid,
        num_prefix: int,
        keep: float = 0.7,
        prune: float = 0.0,
        layers: Sequence[int] | None = None,
        builder: str = 'nearest_centre',
        adapt: int | None = None,
        centres: str | None = None,
        score_power: float = 1.0,
        seed: int = 0,
        rotate: bool = True,
        budget: str | None = None,
        decay: float = 0.0,
        restore: str = 'residual',
        weights: str | None = None,
        matrices: str = 'sparse',
        span: int = 1,
        num_groups: Sequence[int] | None = None,
        detail: int = 16,
        trainable: bool = True,
        checkpoint: bool = False,
        dims: int | None = None,
        layer_cost: tuple[float, float] = (1.0, 0.0),
    ) -> None:
        check_rates(keep, prune)
        super().__init__(depth, grid, num_prefix, keep, dims, layer_cost)
        for name, value, allowed in (
            ('builder', builder, (*BUILDERS, MATCHING)),
            ('centres', centres, (None, *CENTRES)),
            ('budget', budget, (None, *BUDGETS)),
            ('weights', weights, (None, *WEIGHTS)),
            ('matrices', matrices, MATRICES),
        ):
            if value not in allowed:
                raise ValueError(
                    f'{name}={value!r} is unknown; choose one of {allowed}'
                )
        self.prune = prune
        self.layers = self._check_layers(layers)
        self.spans = self._make_spans(span)
        self.builder = builder
        self.uses_scores = builder != MATCHING
        if builder == MATCHING and (
            restore != 'residual' or matrices != 'sparse' or prune
        ):
            raise ValueError(
                "builder='matching' works with restore='residual', "
                f"matrices='sparse' and prune=0 only, got restore={restore!r}"
                f', matrices={matrices!r}, prune={prune}'
            )
        self.centres = centres or (
            'spread' if builder == 'nearest_centre' else 'score'
        )
        self.score_power = score_power
        self.seed = seed
        self.rotate = rotate
        self.budget = budget
        self.decay = decay
        self.mode = check_restore_mode(restore)
        self.weights = weights or (
            'mean' if restore == 'residual' else 'score'
        )
        self.matrices = matrices
        self.checkpoint = checkpoint
        self.given_groups = self._check_num_groups(num_groups)
        if detail < 0:
            raise ValueError(f'detail={detail} is a rank; it must be >= 0')
        wanted = dims and restore == 'residual' and matrices == 'sparse'
        self.detail = min(detail, dims) if wanted else 0
        free = wanted and not prune and self.weights == 'mean'
        self.adapt = self._check_adapt(adapt, bool(free))

        shape = (depth, self.num_tokens)
        self.register_buffer('scores', torch.zeros(shape))
        self.register_buffer('losses', torch.zeros(depth, len(LEVELS)))
        self.register_buffer('group', torch.full(shape, PRUNED))
        if self.adapt:
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(2, (self.dims,), generator=generator)
            signs = 2.0 * signs - 1
            self.register_buffer('signs', signs, persistent=False)
        if matrices == 'sparse':
            self.merge_weight = nn.Parameter(torch.zeros(shape))
            self.restore_weight = nn.Parameter(torch.zeros(shape))
            if self.detail:
                down = torch.empty(depth, self.dims, self.detail)
                self.detail_down = nn.Parameter(down)
                self.detail_up = nn.Parameter(torch.empty_like(down).mT)
                self.reset_detail()
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
        if not self.uses_scores:
            self.merge_weight.requires_grad_(False)
            self.restore_weight.requires_grad_(False)
        self._refresh()

    def _check_adapt(self, adapt: int | None, possible: bool) -> int:
        if adapt is None:
            usual = self.builder == 'nearest_centre'
            return ADAPT if possible and usual else 0
        if adapt < 0 or (adapt and not (possible and self.uses_scores)):
            raise ValueError(
                f'adapt={adapt} must be 0, for the same groups in all images,'
                " or above 0 with restore='residual', matrices='sparse', "
                "weights='mean', prune=0, dims and a static builder; got "
                f'restore={self.mode!r}, matrices={self.matrices!r}, '
                f'weights={self.weights!r}, prune={self.prune}, '
                f'dims={self.dims}, builder={self.builder!r}'
            )
        return adapt

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

    def map_macs(self, groups: int) -> int:
        """Multiply-accumulates of a token map with so many groups.

        Merge, restore, detail path, shortcut, and finding the groups of an
        image; prefix tokens included.
        """
        tokens = self.num_prefix + self.num_tokens
        slots = self.num_prefix + groups
        if self.matrices == 'dense':
            passes = 3 if self.mode == 'residual' else 2
            return passes * slots * tokens * self.dims
        macs = 2 * tokens * self.dims
        macs += 2 * self.detail * (tokens + slots) * self.dims
        if not self.uses_scores:
            macs += (self.num_tokens // 2) ** 2 * self.dims
        if self.adapt:
            dims = sketch_dims(self.dims)
            compared = self.adapt * (NEIGHBOURS * dims + 1)
            summed = (self.adapt - 1) * dims
            macs += self.num_tokens * (compared + summed)
            macs += tokens * (dims + 1)
        return macs

    @property
    def has_scores(self) -> bool:
        """Whether scores were stored or loaded, or none are needed."""
        return not self.uses_scores or bool((self.scores > 0).any())

    @property
    def has_losses(self) -> bool:
        """Whether losses were stored or loaded."""
        return bool((self.losses > 0).any())

    @property
    def wants_losses(self) -> bool:
        """Whether the structure would use losses that are not there."""
        return (
            self.budget in (None, 'loss')
            and self.given_groups is None
            and not self.has_losses
        )

    @torch.no_grad()
    def set_scores(self, scores: Tensor, losses: Tensor | None = None) -> None:
        """Store scores, derive the structure, initialise the weights.

        Args:
            scores (Tensor): Gradient-weighted scores of every layer, >= 0,
                (depth, N).
            losses (Tensor, optional): Loss with one layer (the first of each
                span) compressed to each of ``budget.LEVELS``, (depth,
                levels). budget='loss' cannot do without.

        Raises:
            ValueError: On another shape, NaN, inf, a layer of zeros, or if
                budget='loss' has no losses.
        """
        self.store(scores, losses)
        self.build()

    @torch.no_grad()
    def store(
        self, scores: Tensor | None = None, losses: Tensor | None = None
    ) -> None:
        """Store scores or losses and leave the structure, see set_scores."""
        if scores is not None:
            if tuple(scores.shape) != tuple(self.scores.shape):
                raise ValueError(
                    f'scores have shape {tuple(scores.shape)}, expected '
                    f'{tuple(self.scores.shape)}: {self.depth} layers on a '
                    f'{self.grid[0]}x{self.grid[1]} grid'
                )
            check_scores(scores[list(self.layers)], self.layers)
            self.scores.copy_(scores)
        if losses is not None:
            if losses.shape != self.losses.shape or not (
                torch.isfinite(losses).all()
            ):
                raise ValueError(
                    f'losses of shape {tuple(losses.shape)} must be finite '
                    f'and of shape {tuple(self.losses.shape)}: one for each '
                    f'layer and share of tokens {LEVELS}'
                )
            self.losses.copy_(losses)

    @torch.no_grad()
    def build(self) -> None:
        """Derive structure and initial weights from the stored scores.

        Raises:
            ValueError: If a layer would keep no token, or on scores that
                :meth:`store` would refuse.
        """
        scores = self._stored_scores()
        centres, live = self._count_tokens(scores)
        self.set_groups(self._groups(scores, centres, live, self.grid))

    @torch.no_grad()
    def build_single(self, layer: int, share: float) -> None:
        """Compress one span alone, all other layers stay dense.

        Args:
            layer (int): First layer of the span.
            share (float): Share of the patch tokens it works on.
        """
        scores = self._stored_scores()
        counts = [
            max(round(share * self.num_tokens), 1)
            if layers[0] == layer
            else self.num_tokens
            for layers in self.spans
        ]
        everything = [self.num_tokens] * len(counts)
        self.set_groups(self._groups(scores, counts, everything, self.grid))

    def _count_tokens(self, scores: Tensor) -> tuple[list[int], list[int]]:
        """Centres and merged tokens of each token map."""
        by_loss = self.budget == 'loss' or (
            self.budget is None and self.has_losses
        )
        rule = self.budget if self.budget == 'global' else 'layer'
        if self.uses_scores:
            centres, live = count_tokens(scores, self.keep, self.prune, rule)
        else:
            flat = max(int(self.num_tokens * self.keep), 1)
            centres, live = (
                [flat] * len(scores),
                [self.num_tokens] * len(scores),
            )
        if self.given_groups is not None:
            centres = list(self.given_groups)
        elif by_loss:
            centres = self._allocate()
        for layers, count in zip(self.spans, centres):
            if count == 0:
                raise ValueError(
                    f'layer {layers[0]} would keep none of its '
                    f'{self.num_tokens} tokens at keep={self.keep}: all its '
                    'scores are below the global threshold; raise keep, use '
                    "budget='loss' or leave the layer out of layers"
                )
        return centres, [max(pair) for pair in zip(live, centres)]

    def _allocate(self) -> list[int]:
        if not self.has_losses:
            raise ValueError(
                "budget='loss' needs the measured losses of the layers, and "
                'there are none: use tools/compress.py, PruneMergeHook or '
                'pm_seg.engine.compress, which measure them, pass losses to '
                "set_scores, or set budget='layer'"
            )
        length = max(map(len, self.spans))
        a, b = self.layer_cost
        return allocate(
            [self.losses[layers[0]].tolist() for layers in self.spans],
            self.num_tokens,
            self.keep,
            (a * length, b * length),
            self._overhead(0),
            self.num_prefix,
            self._overhead(1) - self._overhead(0),
        )

    def _overhead(self, groups: int) -> float:
        """Cost of a token map, where costs of layers are known."""
        return self.map_macs(groups) if self.layer_cost[1] else 0.0

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
            if self.detail:
                self.reset_detail()
            return
        weights = self._all_weights(layout, layout.merge, layout.restore)
        for layer, *_ in self.spans:
            dense = self._sparse_map(layout, layer, *weights).to_dense()
            self.merge_matrix[str(layer)].copy_(dense.merge_matrix)
            self.restore_matrix[str(layer)].copy_(dense.restore_matrix)

    @torch.no_grad()
    def reset_detail(self) -> None:
        """A detail path that does nothing yet but can be trained."""
        generator = torch.Generator().manual_seed(self.seed)
        down = torch.randn(self.detail_down.shape, generator=generator)
        self.detail_down.copy_(down / self.dims**0.5)
        self.detail_up.zero_()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._refresh()

    def _apply(self, *args, **kwargs) -> TokenCompressor:
        module = super()._apply(*args, **kwargs)
        self._refresh()
        return module

    # ----------------------------------------------------------------- maps

    def _run(
        self,
        layers: Sequence[nn.Module],
        x: Tensor,
        grid: Grid,
        outputs: Collection[int],
    ) -> LayerOutputs:
        collected = {}
        for stage in self.stages(grid):
            token_map = stage.token_map and stage.token_map.bind(x)
            if self.observer is not None:
                group = token_map and patch_groups(token_map, self.num_prefix)
                self.observer(stage.layers, group, grid)
            start = x
            merged = x = x if token_map is None else token_map.merge(x)
            for layer in stage.layers:
                x = layers[layer](x)
                last = layer == stage.layers[-1]
                if layer in outputs and not last and token_map is not None:
                    collected[layer] = token_map.restore(start, merged, x)
                elif layer in outputs and not last:
                    collected[layer] = x
            if token_map is not None:
                x = self._restore(token_map, start, merged, x)
            if stage.layers[-1] in outputs:
                collected[stage.layers[-1]] = x
        return x, collected

    def _restore(
        self, token_map: AnyTokenMap, x: Tensor, z: Tensor, y: Tensor
    ) -> Tensor:
        """Restore; recomputed in the backward pass with ``checkpoint``."""
        if self.checkpoint and torch.is_grad_enabled():
            return cp.checkpoint(
                token_map.restore, x, z, y, use_reentrant=False
            )
        return token_map.restore(x, z, y)

    def stages(self, grid: Grid) -> list[Stage]:
        """All layers in order, with their token maps.

        Args:
            grid (tuple[int, int]): Patch rows and columns of the input.

        Raises:
            RuntimeError: If there is no structure yet.
        """
        if not self.has_structure:
            raise RuntimeError(
                'compression is configured but there is no structure yet: '
                'the weights come from a dense checkpoint. Run '
                'tools/compress.py on it, train with PruneMergeHook in '
                'custom_hooks, or set compression=None for the dense model'
            )
        spans = {layers[0]: layers for layers in self.spans}
        if self.matrices == 'sparse':
            layout = self._layout(grid)
            merge, restore = self._all_weights(layout, *self._weights(grid))
            if layout.size is not None:
                merge = merge * layout.size
        patches = grid[0] * grid[1]
        stages, layer = [], 0
        while layer < self.depth:
            layers, token_map = spans.get(layer, (layer,)), None
            if layer in spans and self.matrices == 'dense':
                token_map = self._dense_map(layer, grid)
            elif layer in spans and layout.num_groups[layer] == patches:
                pass
            elif layer in spans and not self.uses_scores:
                token_map = SimilarityMap(
                    self.num_prefix,
                    layout.num_groups[layer],
                    self._detail(layer),
                )
            elif layer in spans and self.adapt:
                token_map = AdaptiveMap(
                    layout.segments[layer],
                    self.num_prefix,
                    merge[layer],
                    restore[layer],
                    self.signs,
                    layout.candidates[layer],
                    self.adapt,
                    self._detail(layer),
                )
            elif layer in spans:
                token_map = self._sparse_map(layout, layer, merge, restore)
            stages.append(Stage(layers, token_map))
            layer = layers[-1] + 1
        return stages

    def token_maps(self, grid: Grid) -> list[AnyTokenMap | None]:
        """The token map each layer runs on, None where it runs dense."""
        maps: list[AnyTokenMap | None] = [None] * self.depth
        for stage in self.stages(grid):
            for layer in stage.layers:
                maps[layer] = stage.token_map
        return maps

    def _all_weights(
        self, layout: _Layout, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        """(depth, N) to (depth, P+N): 1 for prefix, 0 for pruned tokens."""
        return tuple(
            F.pad(weight, (self.num_prefix, 0), value=1.0) * layout.live
            for weight in weights
        )

    def _sparse_map(
        self, layout: _Layout, layer: int, merge: Tensor, restore: Tensor
    ) -> TokenMap:
        """Map of one layer from the weights of all tokens, (depth, P+N)."""
        return TokenMap(
            segments=layout.segments[layer],
            merge_weight=merge[layer],
            restore_weight=restore[layer],
            live=layout.live[layer] if layout.any_pruned[layer] else None,
            mode=self.mode,
            detail=self._detail(layer),
        )

    def _detail(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if not self.detail:
            return None
        return self.detail_down[layer], self.detail_up[layer]

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

    def _stored_scores(self) -> Tensor:
        """Stored scores, checked (a checkpoint may hold anything)."""
        if self.uses_scores:
            check_scores(self.scores[list(self.layers)], self.layers)
        return self._normalised(self.scores.float().cpu())

    def _normalised(self, scores: Tensor) -> Tensor:
        """Scores that each token map is made of, (token maps, N)."""
        if not self.uses_scores:
            return scores[[layers[0] for layers in self.spans]]
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
        total = grid[0] * grid[1]
        if not self.uses_scores:  # only their number means something
            group = torch.arange(total).repeat(self.depth, 1)
            for count, layers in zip(centres, self.spans):
                group[list(layers)] %= count
            return group
        alive = torch.stack([top_mask(row, n) for row, n in zip(scores, live)])
        chosen = select_centres(
            scores,
            centres,
            alive,
            grid,
            self.centres,
            self.score_power,
            self.seed,
            self.rotate,
        )
        group = torch.arange(total).repeat(self.depth, 1)
        for row, layers in enumerate(self.spans):
            group[list(layers)] = build_groups(
                chosen[row], alive[row], grid, self.builder
            )
        return group

    def _layout(self, grid: Grid) -> _Layout:
        layout = self._layouts.get((grid, str(self.group.device)))
        return layout or self._derive_layout(grid)

    @torch.compiler.disable
    @torch.inference_mode(False)
    @torch.no_grad()
    def _derive_layout(self, grid: Grid) -> _Layout:
        device = self.group.device
        group, scores = self.group.cpu(), self.scores.float().cpu()
        if grid != self.grid:
            known = (scores[list(self.layers)] > 0).any(1).all()
            if self.uses_scores and not known:
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
            # Where a layer has few scores above 0, resizing can miss them.
            scores[(scores <= 0).all(1)] = 1.0
            centres, live = [], []
            for layer, *_ in self.spans:
                count = round(native.num_groups[layer] * share)
                centres.append(min(max(count, 1), total))
                alive = int((group[layer] != PRUNED).sum())
                live.append(min(max(round(alive * share), centres[-1]), total))
            group = self._groups(self._normalised(scores), centres, live, grid)
        layout = self._make_layout(group, scores, grid, device)
        self._layouts[grid, str(device)] = layout
        while len(self._layouts) > self.max_cached_layouts:
            others = (key for key in self._layouts if key[0] != self.grid)
            del self._layouts[next(others)]
        return layout

    def _make_layout(
        self,
        group: Tensor,
        scores: Tensor,
        grid: Grid,
        device: torch.device,
    ) -> _Layout:
        weights = [
            group_weights(row, members, self.weights)
            for row, members in zip(scores, group)
        ]
        live = F.pad(group != PRUNED, (self.num_prefix, 0), value=True)
        segments = [make_segments(row, self.num_prefix) for row in group]
        candidates = [
            neighbours(
                part.slot[self.num_prefix :] - self.num_prefix,
                part.num_slots - self.num_prefix,
                grid,
            )
            for part in segments
            if self.adapt
        ]
        return _Layout(
            segments=tuple(part.to(device) for part in segments),
            live=live.to(device),
            num_groups=tuple((group.amax(1) + 1).tolist()),
            any_pruned=tuple((~live).any(1).tolist()),
            merge=torch.stack([m for m, _ in weights]).to(device),
            restore=torch.stack([r for _, r in weights]).to(device),
            size=_sizes(segments).to(device) if self.adapt else None,
            candidates=tuple(part.to(device) for part in candidates),
        )

    def extra_repr(self) -> str:
        return (
            f'grid={self.grid}, keep={self.keep}, prune={self.prune}, '
            f'layers={list(self.layers)}, builder={self.builder!r}, '
            f'restore={self.mode!r}, matrices={self.matrices!r}'
        )


def _sizes(segments: Sequence[Segments]) -> Tensor:
    """Members of each token's group in each layer, (depth, P+N)."""
    rows = [part.slot.bincount()[part.slot] for part in segments]
    return torch.stack(rows).float()


def _resize(rows: Tensor, old: Grid, new: Grid) -> Tensor:
    """Bilinear resize of per-token values, (R, h*w) -> (R, h'*w')."""
    maps = rows.reshape(1, -1, *old)
    maps = F.interpolate(maps, size=new, mode='bilinear', align_corners=False)
    return maps.reshape(rows.shape[0], -1)
