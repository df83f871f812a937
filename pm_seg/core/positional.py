"""Groups of tokens by position, from scores: what the paper decides once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .compressor import Compressor, EncoderShape, LayerLoad, check_share
from .structure import (
    PRUNED,
    THRESHOLDS,
    check_groups,
    check_layers,
    check_rates,
    check_scores,
    count_tokens,
    find_keep_rate,
    make_groups,
    normalise_scores,
)


class PositionalCompressor(Compressor):
    """Holds scores of all positions and the groups that follow from them.

    There are no groups until scores are given (:meth:`set_scores`) or a
    compressed checkpoint is loaded; that changes the values of the buffers
    ``scores`` and ``group``, (L, N) each, never their shapes. A subclass says
    what it does with groups: :meth:`_reset`, :meth:`_map_macs`.

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
        self.layers = check_layers(layers, shape.depth, decay)
        self.threshold = threshold
        self.decay = decay
        self.num_groups = None
        if num_groups is not None:
            self.num_groups = self._check_num_groups(num_groups)
        per_token = (shape.depth, shape.num_tokens)
        self.register_buffer('scores', torch.zeros(per_token))
        self.register_buffer('group', torch.full(per_token, PRUNED))
        self._ready = False

    def _check_num_groups(self, given: Sequence[int]) -> tuple[int, ...]:
        counts, most = tuple(map(int, given)), self.shape.num_tokens
        if len(counts) != len(self.layers) or not all(
            1 <= n <= most for n in counts
        ):
            raise ValueError(
                f'num_groups={list(counts)} must hold {len(self.layers)} '
                f'counts in 1..{most}, one for each compressed layer'
            )
        return counts

    # ---------------------------------------------------------------- state

    def _reset(self) -> None:
        """Initialise what is learned, for new groups."""
        raise NotImplementedError

    def _refresh(self) -> None:
        """Called after values or the device of the buffers changed."""
        self._ready = not self.group.is_meta and bool(
            (self.group != PRUNED).any()
        )

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.group.is_meta and (self.group != PRUNED).any():
            check_groups(self.group, self.layers, self.num_groups)
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
        return self._ready

    @property
    def has_scores(self) -> bool:
        """Whether there are scores of all compressed layers."""
        return bool((self.scores[list(self.layers)] > 0).any(1).all())

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
        check_scores(scores[list(self.layers)], self.layers)
        self.scores.copy_(scores)
        self._refresh()

    @torch.no_grad()
    def build(self) -> None:
        """Derive structure and initial weights from the stored scores.

        Raises:
            ValueError: If a layer would keep no token, the share asked for by
                :meth:`set_keep` is out of reach, or there are no scores.
        """
        scores = self.scores[list(self.layers)].cpu()
        check_scores(scores, self.layers)
        scores = self._normalised(scores)
        rate, rules = self.keep_rate, (self.prune_rate, self.threshold)
        if self.keep is not None:
            rate = find_keep_rate(self._share_with, scores, self.keep, *rules)
        centres, live = count_tokens(scores, rate, *rules)
        centres = self.num_groups or centres
        if 0 in centres:
            raise ValueError(
                f'layer {self.layers[centres.index(0)]} would keep none of '
                f'its tokens at keep_rate={rate:.3g}: all its scores are '
                'below the global threshold; keep more, leave it out of '
                "layers or use threshold='layer'"
            )
        live = [max(pair) for pair in zip(live, centres)]
        rows = make_groups(scores, centres, live, self.shape.grid)
        self.set_groups(self._all_layers(rows))
        self.keep_rate = rate

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
        check_groups(group, self.layers, self.num_groups)
        self.group.copy_(self._all_layers(group[list(self.layers)]))
        self._refresh()
        self._reset()

    def _all_layers(self, rows: Tensor) -> Tensor:
        """Groups of all layers from those of compressed ones, on the CPU."""
        alone = torch.arange(rows.shape[1]).repeat(self.shape.depth, 1)
        alone[list(self.layers)] = rows.cpu()
        return alone

    def _normalised(self, scores: Tensor) -> Tensor:
        """Scores of compressed layers; those without any count as equal."""
        scores = scores.clone()
        scores[(scores <= 0).all(1)] = 1.0
        return normalise_scores(scores, self.decay, self.layers)

    def _check_shape(self, name: str, given: Tensor) -> None:
        expected = (self.shape.depth, self.shape.num_tokens)
        if tuple(given.shape) != expected:
            raise ValueError(
                f'{name} have shape {tuple(given.shape)}, expected {expected}:'
                f' {expected[0]} layers on a grid of {self.shape.grid} patches'
            )

    def loads(self) -> list[LayerLoad]:
        """What each layer works on and costs, on the native grid.

        Raises:
            RuntimeError: If there is no structure yet.
        """
        self._check_ready()
        counts = (self.group.amax(1) + 1).tolist()
        pruned = (self.group == PRUNED).sum(1).tolist()
        return [
            LayerLoad(count, count, self._macs(layer, count), missing)
            for layer, (count, missing) in enumerate(zip(counts, pruned))
        ]

    def _macs(self, layer: int, groups: int) -> float:
        macs = self.shape.cost(self.shape.num_prefix + groups)
        return macs + (self._map_macs(groups) if layer in self.layers else 0)

    def _map_macs(self, groups: int) -> float:
        """Of merging to so many groups and back, 0 if nothing is done."""
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
        if not self._ready:
            raise RuntimeError(
                'compression is configured but there is no structure yet: '
                'the weights come from a dense checkpoint. Run '
                'tools/compress.py on it, train with PruneMergeHook in '
                'custom_hooks, or set compression=None for the dense model'
            )


def check_option(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of those allowed."""
    if value not in allowed:
        raise ValueError(
            f'{name}={value!r} is unknown; choose one of {tuple(allowed)}'
        )
