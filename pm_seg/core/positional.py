"""Groups of tokens by position, from scores: what the paper decides once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compressor import (
    Compressor,
    EncoderShape,
    LayerLoad,
    check_option,
    check_share,
)
from .schedule import solve
from .structure import (
    PRUNED,
    THRESHOLDS,
    check_rates,
    check_scores,
    count_tokens,
    group_weights,
    make_groups,
    normalise_scores,
)


class PositionalCompressor(Compressor):
    """Holds scores of all positions and the groups that follow from them.

    There are no groups until scores are given (:meth:`set_scores`) or a
    compressed checkpoint is loaded; that changes the values of the buffers
    ``scores`` and ``group``, (L, N) each, never their shapes. A subclass says
    what it does with groups: :meth:`_start`, :meth:`_macs`.

    Args:
        shape (EncoderShape): The transformer.
        keep_rate, prune_rate, layers, threshold, decay, num_groups: See
            :class:`~pm_seg.core.static.StaticCompressor`.
    """

    needs_scores = True

    def __init__(
        self,
        shape: EncoderShape,
        keep_rate: float,
        prune_rate: float,
        layers: Sequence[int] | None,
        threshold: str,
        decay: float,
        num_groups: Sequence[int] | None,
    ) -> None:
        super().__init__(shape)
        check_rates(keep_rate, prune_rate)
        check_option('threshold', threshold, THRESHOLDS)
        self.keep: float | None = None  # see set_keep
        self.keep_rate = keep_rate
        self.prune_rate = prune_rate
        self.threshold = threshold
        self.decay = decay
        self.layers = self._check_layers(layers)
        self.num_groups = self._check_num_groups(num_groups)
        per_token = (shape.depth, shape.num_tokens)
        self.register_buffer('scores', torch.zeros(per_token))
        self.register_buffer('group', torch.full(per_token, PRUNED))
        self._refresh()

    def _check_layers(self, layers: Sequence[int] | None) -> list[int]:
        depth = self.shape.depth
        chosen = sorted({*(range(depth) if layers is None else layers)})
        if not chosen or not 0 <= chosen[0] <= chosen[-1] < depth:
            raise ValueError(
                f'layers={list(layers)} must name at least one of the layers '
                f'0..{depth - 1}, and no others'
            )
        least = 1 - self.decay * chosen[-1]
        if not 0 < least <= 1:
            raise ValueError(
                f'decay={self.decay} leaves layer {chosen[-1]} {least:.3g} of '
                'its scores, expected a share in (0, 1]; lower decay, for '
                'example to 0.025, but not below 0'
            )
        return chosen

    def _check_num_groups(self, given: Sequence[int] | None) -> list[int]:
        counts, most = list(given or ()), self.shape.num_tokens
        if given is not None and (
            len(counts) != len(self.layers)
            or not all(1 <= count <= most for count in counts)
        ):
            raise ValueError(
                f'num_groups={counts} must hold {len(self.layers)} counts in '
                f'1..{most}, one for each compressed layer'
            )
        return counts

    # ---------------------------------------------------------------- state

    def _refresh(self) -> None:
        """Read what the groups are, after they or their device changed."""
        self._counts: list[int] = []
        if not self.group.is_meta and (self.group != PRUNED).any():
            self._counts = (self.group.amax(1) + 1).tolist()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.group.is_meta and (self.group != PRUNED).any():
            self._check_groups(self.group)
        self._refresh()

    def _apply(self, *args, **kwargs) -> PositionalCompressor:
        """Move or cast; scores, which fp16 would round to 0, stay float32."""
        scores = self.scores
        super()._apply(*args, **kwargs)
        if scores.is_meta and not self.scores.is_meta:  # values of any kind
            self.scores.zero_()
            self.group.fill_(PRUNED)
        elif self.scores.dtype != scores.dtype:
            self.scores = scores.to(self.scores.device)
        self._refresh()
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
        """Store scores, derive the structure, initialise the weights.

        Args:
            scores (Tensor): Gradient-weighted scores, >= 0, (L, N). Rows of
                layers that are not compressed are ignored.

        Raises:
            ValueError: On another shape, NaN, inf, a layer of zeros, or if a
                layer would keep no token.
        """
        self.store(scores)
        self.build()

    @torch.no_grad()
    def store(self, scores: Tensor) -> None:
        """Store scores and leave the structure, see :meth:`set_scores`."""
        self._check_shape('scores', scores)
        check_scores(scores[self.layers], self.layers)
        self.scores.copy_(scores)

    @torch.no_grad()
    def build(self) -> None:
        """Derive structure and initial weights from the stored scores.

        Raises:
            ValueError: If a layer would keep no token, the share asked for by
                :meth:`set_keep` is out of reach, or there are no scores.
        """
        scores = self.scores[self.layers].cpu()
        check_scores(scores, self.layers)
        scores = normalise_scores(scores, self.decay, self.layers)
        rate = self._rate(scores)
        rules = rate, self.prune_rate, self.threshold
        centres, live = count_tokens(scores, *rules)
        centres = self.num_groups or centres
        if 0 in centres:
            raise ValueError(
                f'layer {self.layers[centres.index(0)]} would keep none of '
                f'its tokens at keep_rate={rate:.3g}: all its scores are '
                'below the global threshold; keep more, leave it out of '
                "layers or use threshold='layer'"
            )
        live = [max(pair) for pair in zip(live, centres)]
        group = self.group.clone()
        rows = make_groups(scores, centres, live, self.shape.grid)
        group[self.layers] = rows.to(group.device)
        self.set_groups(group)
        self.keep_rate = rate

    def _rate(self, scores: Tensor) -> float:
        """The highest ``keep_rate`` that does not cost more than ``keep``."""
        if self.keep is None:
            return self.keep_rate
        # One centre in each layer at least.
        least, most = 0.5 / scores.shape[1], 1 - self.prune_rate

        def cost(rate: list[float]) -> float:
            rules = *rate, self.prune_rate, self.threshold
            return self._share_with(count_tokens(scores, *rules)[0])

        def rates(strength: float) -> list[float]:
            return [most - (most - least) * strength]

        try:  # shares are sums of floats
            return solve(rates, cost, self.keep + 1e-9, most=1.0)[0]
        except ValueError as error:
            raise ValueError(
                f'keep={self.keep} is out of reach: of the operations of all '
                f'layers {error}, with one group in each compressed layer; '
                'keep more, or compress more layers'
            ) from None

    def set_keep(self, keep: float) -> None:
        """Make the layers cost this share of the dense layers' MACs.

        By the highest ``keep_rate`` at which they do not cost more, which
        :meth:`build` finds: now if there are scores, else as soon as there
        are.

        Raises:
            ValueError: If it is not in (0, 1], out of reach, or the groups
                are fixed by ``num_groups``.
        """
        check_share('keep', keep)
        if self.num_groups:
            raise ValueError(
                f'keep={keep} cannot be set: num_groups={self.num_groups} '
                'fixes what the layers cost; leave num_groups out, and '
                "matrices='dense' with it"
            )
        before, self.keep = self.keep, keep
        try:
            if self.has_scores:
                self.build()
        except ValueError:
            self.keep = before
            raise

    @torch.no_grad()
    def set_groups(self, group: Tensor) -> None:
        """Use the given groups and initialise the weights for them.

        Args:
            group (Tensor): Group of each token on the native grid, numbered
                0..K-1 in each layer, -1 if pruned, int64, (L, N). Rows of
                layers that are not compressed are ignored.

        Raises:
            ValueError: On another shape, gaps in the numbers, or a number of
                groups that contradicts ``num_groups``.
        """
        self._check_shape('group', group)
        self._check_groups(group)
        self.group.copy_(torch.arange(group.shape[1]))
        self.group[self.layers] = group[self.layers].to(self.group.device)
        self._refresh()
        scores = self.scores[self.layers].cpu()
        scores[(scores <= 0).all(1)] = 1.0  # without any, all count alike
        scores = normalise_scores(scores, self.decay, self.layers)
        for layer, row in zip(self.layers, scores):
            weights = group_weights(row, self.group[layer].cpu())
            self._start(
                layer, *(weight.to(self.group.device) for weight in weights)
            )

    def _start(self, layer: int, merge: Tensor, restore: Tensor) -> None:
        """Initialise what is learned with weights of patches, (N,) each."""
        raise NotImplementedError

    def _check_shape(self, name: str, given: Tensor) -> None:
        expected = (self.shape.depth, self.shape.num_tokens)
        if tuple(given.shape) != expected:
            raise ValueError(
                f'{name} have shape {tuple(given.shape)}, expected {expected}:'
                f' {expected[0]} layers on a grid of {self.shape.grid} patches'
            )

    def _check_groups(self, group: Tensor) -> None:
        counts = self.num_groups or [None] * len(self.layers)
        for layer, count in zip(self.layers, counts):
            used = group[layer].unique()
            used = used[used != PRUNED].tolist()
            if not used or used != list(range(len(used))):
                raise ValueError(
                    f'groups of layer {layer} must be numbered 0..K-1 without '
                    f'gaps, K >= 1, and -1 where pruned; got {used[:8]}...'
                )
            if count not in (None, len(used)):
                raise ValueError(
                    f'layer {layer} has {len(used)} groups, num_groups says '
                    f'{count}; give as many, or leave num_groups out'
                )

    # ----------------------------------------------------------------- cost

    def loads(self) -> list[LayerLoad]:
        self._check_ready()
        pruned = (self.group == PRUNED).sum(1).tolist()
        return [
            LayerLoad(count, count, self._macs(layer, count), missing)
            for layer, (count, missing) in enumerate(zip(self._counts, pruned))
        ]

    def _macs(self, layer: int, groups: int) -> float:
        """Of a layer on so many groups, with merging and restoring."""
        raise NotImplementedError

    def _share_with(self, groups: Sequence[int]) -> float:
        """Share of the MACs with so many groups in the compressed layers."""
        counts = dict(zip(self.layers, groups))
        macs = sum(
            self._macs(layer, counts.get(layer, self.shape.num_tokens))
            for layer in range(self.shape.depth)
        )
        return macs / self.shape.dense_macs

    def _check_ready(self) -> None:
        if not self._counts:
            raise RuntimeError(
                'compression is configured but there is no structure yet: '
                'the weights come from a dense checkpoint. Run '
                'tools/compress.py on it, train with PruneMergeHook in '
                'custom_hooks, or set compression=None for the dense model'
            )
