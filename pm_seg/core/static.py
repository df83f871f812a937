"""The paper's method: tokens merge and are restored around every layer.

Mao et al., "Efficient Token Compression for Vision Transformer with Spatial
Information Preserved" (arXiv 2503.23455): groups by position, the same for
every image, from gradient-weighted scores (:mod:`~pm_seg.core.scores`,
:mod:`~pm_seg.core.structure`), merged and restored by weights that are trained
with the model (:mod:`~pm_seg.core.token_map`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compressor import (
    Compressor,
    EncoderShape,
    Layer,
    LayerLoad,
    Outputs,
    check_option,
    check_share,
    plainly,
)
from .merging import Grid
from .rows import extra_of
from .structure import (
    PRUNED,
    check_rates,
    check_scores,
    count_groups,
    count_tokens,
    group_weights,
    make_groups,
    normalise_scores,
)
from .token_map import DenseTokenMap, TokenMap, group_means, on_grid


class StaticCompressor(Compressor):
    """Merges and restores tokens by position around each compressed layer.

    There are no groups until scores are given (:meth:`set_scores`) or a
    compressed checkpoint is loaded. On another grid than the native one the
    matrices are resized.

    Args:
        shape (EncoderShape): The transformer.
        keep_rate (float): Share of the patch tokens that compressed layers
            work on. Defaults to 0.7.
        prune_rate (float): Share of the patch tokens that bypass them.
            Defaults to 0 (the paper's Segmenter; 0.1 in its classifiers).
        layers (Sequence[int], optional): Layers to compress. Defaults to all.
        threshold (str): 'layer' or 'global', see
            :func:`~pm_seg.core.structure.count_tokens`. Defaults to 'layer'.
        decay (float): How much less the scores of each further layer count
            (the paper's classifiers: 0.025). Defaults to 0.
        matrices (str): 'sparse' for a merge and a restore weight per token,
            'dense' for full matrices, as in released checkpoints. Defaults
            to 'sparse'.
        num_groups (Sequence[int], optional): Groups of each compressed layer,
            instead of what ``keep_rate`` gives. 'dense' needs it, for shapes.

    Raises:
        ValueError: On an unknown option or a value out of range.
    """

    needs_scores = True

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
        super().__init__(shape)
        depth, tokens = per_token = shape.depth, shape.num_tokens
        check_rates(keep_rate, prune_rate)
        check_option('threshold', threshold, ('layer', 'global'))
        check_option('matrices', matrices, ('sparse', 'dense'))
        chosen = sorted({*(range(depth) if layers is None else layers)})
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < depth:
            raise ValueError(
                f'layers={list(layers)} must name at least one of the layers '
                f'0..{depth - 1}, and no others'
            )
        least = 1 - decay * chosen[-1]
        if not 0 < least <= 1:
            raise ValueError(
                f'decay={decay} leaves layer {chosen[-1]} {least:.3g} of its '
                'scores, expected a share in (0, 1]: 0.025 is what the paper '
                'takes'
            )
        self.dense = matrices == 'dense'
        counts = list(num_groups or ())
        fit = all(1 <= count <= tokens for count in counts)
        fit = fit and len(counts) == len(chosen)
        if not fit and (self.dense or num_groups is not None):
            raise ValueError(
                f'num_groups={num_groups} must hold {len(chosen)} counts in '
                f'1..{tokens}, one for each compressed layer'
            )
        self.layers, self.num_groups = chosen, counts
        self.keep: float | None = None  # see set_keep
        self.keep_rate, self.decay = keep_rate, decay
        self._rules = prune_rate, threshold
        self.register_buffer('scores', torch.zeros(per_token))
        self.register_buffer('group', torch.full(per_token, PRUNED))
        self._counts: list[int] = []  # groups of each layer, once known
        if self.dense:
            self.merge_matrix = nn.ParameterDict()
            self.restore_matrix = nn.ParameterDict()
            tokens += shape.num_prefix
            for layer, count in zip(chosen, counts):
                merged, key = shape.num_prefix + count, str(layer)
                self.merge_matrix[key] = torch.zeros(merged, tokens)
                self.restore_matrix[key] = torch.zeros(tokens, merged)
        else:
            self.merge_weight = nn.Parameter(torch.zeros(per_token))
            self.restore_weight = nn.Parameter(torch.zeros(per_token))

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._counts = []
        if not self.group.is_meta and (self.group != PRUNED).any():
            # What full matrices merge is not for the groups to say.
            layers = [] if self.dense else self.layers
            self._counts = count_groups(self.group, layers, self.num_groups)
            for layer, count in zip(self.layers, self.num_groups):
                self._counts[layer] = count

    def _apply(self, *args, **kwargs) -> StaticCompressor:
        """Move or cast; scores, which fp16 would round to 0, stay float32."""
        scores = self.scores
        super()._apply(*args, **kwargs)
        if scores.is_meta and not self.scores.is_meta:  # values of any kind
            self.scores.zero_()
            self.group.fill_(PRUNED)
            self._counts = []
        elif self.scores.dtype != scores.dtype:
            self.scores = scores.to(self.scores.device)
        return self

    @property
    def has_structure(self) -> bool:
        """Whether scores were given or a compressed checkpoint loaded."""
        return bool(self._counts)

    @property
    def has_scores(self) -> bool:
        """Whether there are scores of all compressed layers."""
        return bool((self.scores[self.layers] > 0).any(1).all())

    def set_scores(self, scores: Tensor) -> None:
        """Store scores, >= 0, (L, N), derive the structure, initialise the
        weights. Rows of layers that are not compressed are ignored.

        Raises:
            ValueError: On another shape, or if a layer would keep no token.
        """
        self.store(scores)
        self.build()

    @torch.no_grad()
    def store(self, scores: Tensor) -> None:
        """Store scores and leave the structure, see :meth:`set_scores`."""
        self._check_shape('scores', scores)
        check_scores(scores[self.layers], self.layers)
        self.scores.copy_(scores)

    def _check_shape(self, name: str, given: Tensor) -> None:
        found, wanted = tuple(given.shape), tuple(self.group.shape)
        if found != wanted:
            raise ValueError(
                f'{name} have shape {found}, expected {wanted}: {wanted[0]} '
                f'layers on a grid of {self.shape.grid} patches'
            )

    @torch.no_grad()
    def build(self, keep: float | None = None) -> None:
        """Derive structure and initial weights from the stored scores, to
        ``keep``, or what :meth:`set_keep` was given."""
        scores = self.scores[self.layers].cpu()
        check_scores(scores, self.layers)
        scores = normalise_scores(scores, self.decay, self.layers)
        keep = keep or self.keep
        rate = self._rate(scores, keep) if keep else self.keep_rate
        centres, live = count_tokens(scores, rate, *self._rules)
        centres = self.num_groups or centres
        if 0 in centres:
            raise ValueError(
                f'layer {self.layers[centres.index(0)]} would keep none of '
                f'its tokens at keep_rate={rate:.3g}: all its scores are '
                'below the global threshold; keep more, leave it out of '
                "layers or use threshold='layer'"
            )
        rows = make_groups(scores, centres, live, self.shape.grid)
        group = torch.zeros_like(self.group, device='cpu')
        group[self.layers] = rows
        self.set_groups(group)
        self.keep_rate = rate

    def _rate(self, scores: Tensor, keep: float) -> float:
        """The highest ``keep_rate`` that does not cost more than ``keep``."""
        tokens, most = self.shape.num_tokens, 1 - self._rules[0]
        # Half a token above each count of groups, as floats round.
        counts = range(1, round(tokens * most) + 1)
        rates = [min((count + 0.5) / tokens, most) for count in counts]

        def cost(rate: float) -> float:
            centres, _ = count_tokens(scores, rate, *self._rules)
            groups = dict.fromkeys(range(self.shape.depth), tokens)
            groups.update(zip(self.layers, centres))
            macs = sum(self._macs(*layer) for layer in groups.items())
            return macs / self.shape.dense_macs

        found = bisect_right(rates, keep + 1e-9, key=cost)
        if not found:
            raise ValueError(
                f'keep={keep} is out of reach: of the operations of all '
                f'layers {cost(rates[0]):.3f} is its least, with one group in '
                'each compressed layer; keep more, or compress more layers'
            )
        return rates[found - 1]

    def set_keep(self, keep: float) -> None:
        """Make the layers cost this share of the dense layers' MACs, at most,
        once there are scores.

        Raises:
            ValueError: If it is out of reach, or ``num_groups`` fixes it.
        """
        check_share('keep', keep)
        if self.num_groups:
            raise ValueError(
                f'keep={keep} cannot be set: num_groups={self.num_groups} '
                "fixes the cost; leave it and matrices='dense' out"
            )
        if self.has_scores:
            self.build(keep)
        self.keep = keep

    @torch.no_grad()
    def set_groups(self, group: Tensor) -> None:
        """Use the given groups, numbered 0..K-1 in each layer, -1 if pruned,
        int64, (L, N), and initialise the weights for them. Rows of layers
        that are not compressed are ignored.

        Raises:
            ValueError: On another shape, or other numbers than these.
        """
        self._check_shape('group', group)
        self._counts = count_groups(group, self.layers, self.num_groups)
        self.group.copy_(torch.arange(group.shape[1]))
        self.group[self.layers] = group[self.layers].to(self.group.device)
        group, scores = group.cpu(), self.scores[self.layers].cpu()
        scores[(scores <= 0).all(1)] = 1.0  # without any, all count alike
        scores = normalise_scores(scores, self.decay, self.layers)
        for layer, row in zip(self.layers, scores):
            start = group_weights(row, group[layer])
            if self.dense:
                count, prefix = self._counts[layer], self.shape.num_prefix
                full = TokenMap.of_groups(group[layer], count, *start, prefix)
                start = full.merge_matrix, full.restore_matrix
            for weight, value in zip(self._weights(layer), start):
                weight.copy_(value)

    def loads(self) -> list[LayerLoad]:
        counts = self._known_counts()
        pruned = (self.group == PRUNED).sum(1).tolist()
        macs = map(self._macs, range(len(counts)), counts)
        return [LayerLoad(*x) for x in zip(counts, counts, macs, pruned)]

    def _macs(self, layer: int, groups: int) -> float:
        """Of a layer on so many groups; one for each value that is merged or
        restored, or those of the products with full matrices."""
        prefix, tokens = self.shape.num_prefix, self.shape.num_tokens
        passes = 0
        if self.dense and layer in self.layers:
            passes = 2 * (prefix + groups) + 1
        elif groups < tokens:
            passes = 2
        dims = passes * self.shape.dims + (passes > 0) * self.shape.extra_dims
        return self.shape.cost(prefix + groups) + (prefix + tokens) * dims

    def _known_counts(self) -> list[int]:
        if not self._counts:
            raise RuntimeError(
                'compression is configured but there is no structure yet: '
                'the weights come from a dense checkpoint. Run '
                'tools/compress.py on it, train with PruneMergeHook in '
                'custom_hooks, or set compression=None for the dense model'
            )
        return self._counts

    def _run(
        self,
        layers: Sequence[Layer],
        x: Tensor,
        grid: Grid,
        outputs: Collection[int],
        extra: Tensor | None,
    ) -> Outputs:
        collected, prefix = {}, self.shape.num_prefix
        for index, token_map in enumerate(self.token_maps(grid)):
            layer, own = layers[index], extra_of(extra, index)
            if token_map is None:
                x = plainly(layer, x, own)
            else:
                own = [group_means(token_map, rows, prefix) for rows in own]
                z = token_map.merge(x)
                x = token_map.restore(x, plainly(layer, z, own))
            if self.observer is not None:
                group = token_map and token_map.groups(prefix)[None]
                self.observer._see(index, group, grid)
            if index in outputs:
                collected[index] = x
        return Outputs(x, collected)

    def token_maps(self, grid: Grid) -> list[TokenMap | DenseTokenMap | None]:
        """Token map of each layer on a grid (h, w), None if on all tokens."""
        maps, prefix = [], self.shape.num_prefix
        for layer, count in enumerate(self._known_counts()):
            group = self.group[layer]
            if self.dense and layer in self.layers:
                live = F.pad(group != PRUNED, (prefix, 0), value=True)
                found = DenseTokenMap(*self._weights(layer), live)
            elif count < self.shape.num_tokens:
                weights = self._weights(layer)
                found = TokenMap.of_groups(group, count, *weights, prefix)
            else:
                maps.append(None)
                continue
            maps.append(on_grid(found, prefix, self.shape.grid, grid))
        return maps

    def _weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """What merges and what restores, of a compressed layer."""
        if not self.dense:
            return self.merge_weight[layer], self.restore_weight[layer]
        return self.merge_matrix[str(layer)], self.restore_matrix[str(layer)]
