"""Merge once, restore once: tokens merge over depth and stay merged.

Before layer l the patch tokens of each image merge down to K_l, the most
similar ones first, and stay merged; after the last layer, or wherever all
tokens are asked for, the merges are undone, newest first, and each token gets
what it was plus what its group gained. That works with any weights and any
grid, and better with what :mod:`~pm_seg.core.importance` finds on some images.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from .comparison import Comparison
from .compressor import (
    Compressor,
    EncoderShape,
    Layer,
    LayerLoad,
    Outputs,
    check_option,
)
from .merging import RESTORES, Chain, Grid, Merge
from .rows import full_precision
from .schedule import WHOLE, Schedule
from .similarity import WINDOW, match, match_windows


class ProgressiveCompressor(Compressor):
    """Merges similar tokens of each image more and more over depth.

    Args:
        shape (EncoderShape): The transformer.
        keep (float): MACs of the layers as a share of the dense layers',
            with finding groups, merging and restoring. Defaults to 0.5.
        schedule (str): How tokens get fewer over depth: 'power' (default,
            :func:`~pm_seg.core.schedule.power_shares`), 'constant' (ToMe) or
            'local_global' (ALGM; its first merge is of 2x2 windows).
        power (float): Of the schedule 'power'. Defaults to 0.6, for dense
            prediction; classifiers do better with 1.
        first (int): First layer that works on fewer tokens, of the schedule
            'power'. Defaults to 1.
        step (float): Least share of the tokens there are that merges at once
            (:func:`~pm_seg.core.schedule.merging_layers`). Defaults to 1/8;
            classifiers do better with 0.
        compare (str): What is compared: a count 'sketch' of the tokens
            (default; random signs, folded to about 64 channels), the 'keys'
            of the layer (mean of the heads, as ToMe; better for classifiers)
            or the 'tokens' themselves. Once calibrated, principal components
            of the normed tokens, better than all of these.
        between (bool): Whether a layer merges between attention and MLP, as
            ToMe and ALGM, instead of before the layer. Defaults to False.
        restore (str): 'residual' (default), or 'replace' as ToMe-like methods.
        size_aware (bool): Whether attention counts a token as often as the
            patches it stands for (ToMe's proportional attention). Defaults
            to True.
        balance (float): Power of the sizes of two tokens by which they differ
            more, so that groups grow evenly. Defaults to 0, for dense
            prediction, where an even region may be one group; classifiers do
            better with 1/2.

    Raises:
        ValueError: On an unknown option or a value out of range.
    """

    def __init__(
        self,
        shape: EncoderShape,
        keep: float = 0.5,
        schedule: str = 'power',
        power: float = 0.6,
        first: int = 1,
        step: float = 0.125,
        compare: str = 'sketch',
        between: bool = False,
        restore: str = 'residual',
        size_aware: bool = True,
        balance: float = 0.0,
    ) -> None:
        super().__init__(shape)
        check_option('restore', restore, RESTORES)
        self.comparison = Comparison(shape, compare, balance)
        self.schedule = Schedule(
            shape, schedule, power, first, step, between, compare
        )
        self.restore, self.size_aware = restore, size_aware
        # Millionths of the patch tokens that each layer works on: integers
        # stay what they are when a model is cast to half precision.
        self.register_buffer('shares', torch.full((shape.depth,), WHOLE))
        # Factor of what a group of several gained, for its members: trained.
        self.gain = nn.Parameter(torch.ones(shape.depth))
        self.register_buffer('power', torch.tensor(power))
        self.register_buffer('settled', torch.tensor(False))
        self.register_buffer('by_components', torch.tensor(False))
        self.set_keep(keep)

    def set_keep(self, keep: float, power: float | None = None) -> None:
        """Find the schedule whose layers cost this share of the dense ones,
        with another ``power`` if given, or raise ``ValueError``."""
        schedule, shares = self._solve(keep, power or self.schedule.power)
        shares = [round(x * WHOLE) for x in shares]
        self.schedule, self.keep = schedule, keep
        self.by_components.fill_(schedule.compare == 'components')
        self.shares.copy_(torch.tensor(shares, device=self.shares.device))
        self._shares = [share / WHOLE for share in shares]
        self.power.fill_(schedule.power)
        self.gain.requires_grad_(self.has_gain and keep < 1)

    def _solve(
        self, keep: float, power: float
    ) -> tuple[Schedule, list[float]]:
        compare = self.comparison.without_data
        schedule = replace(self.schedule, power=power, compare=compare)
        if self.calibrated:
            better = replace(schedule, compare='components')
            with suppress(ValueError):  # they cost too much for least budgets
                return better, better.solve(keep)
        return schedule, schedule.solve(keep)

    def set_grid(self, grid: Grid) -> None:
        self.shape = replace(self.shape, grid=grid)
        self.schedule = replace(self.schedule, shape=self.shape)
        self.set_keep(self.keep)

    def leave_merged(self) -> None:
        self.schedule = replace(self.schedule, whole=False)
        self.set_keep(self.keep)

    @property
    def compressed(self) -> bool:
        return bool(self.settled)

    def settle(self) -> None:
        self.settled.fill_(True)

    def learn(self, directions: Tensor, components: Tensor) -> None:
        """Compare by what :class:`~pm_seg.core.importance.ImportanceFitter`
        found, (L, C) and (L, C, D), where the budget allows for it."""
        self.comparison.learn(directions, components)
        self.set_keep(self.keep)

    def set_strength(self, strength: float) -> None:
        """Say how much importance counts against similarity, 0 for not."""
        self.comparison.set_strength(strength)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.shares.is_meta:
            self._shares = [x / WHOLE for x in self.shares.tolist()]
            compare = self.comparison.without_data
            if self.by_components:
                compare = 'components'
            changes = dict(power=float(self.power), compare=compare)
            self.schedule = replace(self.schedule, **changes)
            self.keep = round(self.share, 4)

    @property
    def has_gain(self) -> bool:
        """Whether updates are restored, so that gains play a part."""
        return self.restore == 'residual' and self.schedule.whole

    @property
    def calibrated(self) -> bool:
        """Whether images have said what to compare."""
        return self.comparison.calibrated

    @property
    def calibrates(self) -> bool:
        """Whether images can make it better: ours, not those of peers."""
        return self.schedule.kind == 'power' and not self.schedule.between

    def tokens(self, grid: Grid) -> list[int]:
        """Patch tokens that each layer's MLP works on, for any grid."""
        return self.schedule.tokens(self._shares, grid)

    def loads(self) -> list[LayerLoad]:
        return self.schedule.loads(self._shares)

    def _run(
        self,
        layers: Sequence[Layer],
        x: Tensor,
        grid: Grid,
        outputs: Collection[int],
        extra: Tensor | None,
    ) -> Outputs:
        chain = Chain(x, self.shape.num_prefix, extra, self.size_aware)
        collected = {}
        for index, (layer, left) in enumerate(zip(layers, self.tokens(grid))):
            compared = chain.x  # of merges in between, what came before
            if self.schedule.between:
                chain.x = layer.attend(*chain.inputs_of(index))
            while chain.tokens > left:
                count = self.schedule.at_once(index, chain.tokens, left)
                merge = self._match(
                    compared, chain.size, count, index, layer, grid
                )
                chain.merge(merge, self.gain[index])
                compared = chain.x
            if self.schedule.between:
                chain.x = layer.feed_forward(chain.x)
            elif self.schedule.ends_early(index, len(chain.steps) > 0):
                x = layer.attend(*chain.inputs_of(index))
                chain.x = layer.feed_forward(x[:, : chain.num_prefix])
            else:
                chain.x = layer(*chain.inputs_of(index))
            if self.observer is not None:
                groups = chain.groups()
                self.observer._see(index, groups and groups.place, grid)
            if index in outputs or index == len(layers) - 1:
                whole = self.schedule.whole
                last = chain.restored(self.restore) if whole else chain.x
            if index in outputs:
                collected[index] = last
        return Outputs(last, collected, chain.groups())

    @torch.no_grad()
    def _match(
        self,
        x: Tensor,
        size: Tensor,
        count: int,
        index: int,
        layer: Layer,
        grid: Grid,
    ) -> Merge:
        """Which tokens merge; found in full precision, as far as x has it."""
        prefix = self.shape.num_prefix
        patches, size = x[:, prefix:], size[:, prefix:, 0]
        with full_precision(x):
            metric, weight = self.comparison(
                patches, size, index, layer, self.schedule.compare
            )
            if self.schedule.in_windows(index):
                windows = count // (WINDOW - 1)
                return match_windows(metric, windows, grid, prefix)
            return match(metric, count, prefix, weight)

    def extra_repr(self) -> str:
        return (
            f'keep={self.keep}, schedule={self.schedule.kind!r}, '
            f'compare={self.schedule.compare!r}, restore={self.restore!r}, '
            f'size_aware={self.size_aware}'
        )
