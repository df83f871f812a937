"""How many tokens each layer keeps, from a budget of operations."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from numbers import Real

from .compressor import EncoderShape, LayerLoad, check_option, check_share
from .merging import Grid
from .similarity import COMPARES, WINDOW

FLOOR = 0.1  # share of the patch tokens that is always left
WHOLE = 1_000_000  # shares are millionths


def power_shares(
    strength: float, depth: int, power: float, first: int
) -> list[float]:
    """Fewer tokens from layer to layer, smoothly.

    ``1 - strength ((l - first + 1) / (depth - first))^power`` of the tokens
    in layer l >= first, not below ``FLOOR``, for a strength >= 0; a power
    below 1 merges more in early layers. Large single steps are worse: a
    schedule from losses of single layers had three times the error.
    """
    steps = [max(layer - first + 1, 0) for layer in range(depth)]
    return [
        max(1 - strength * (step / (depth - first)) ** power, FLOOR)
        for step in steps
    ]


def constant_shares(strength: float, depth: int, *_: float) -> list[float]:
    """ToMe's: every layer merges equally many tokens, at most half."""
    shares, share = [], 1.0
    for _ in range(depth):
        share -= min(strength / depth, share / 2)
        shares.append(max(share, FLOOR))
    return shares


def local_global_shares(strength: float, depth: int, *_: float) -> list[float]:
    """ALGM's: a share of the windows merges in the first layer, and of the
    tokens left half-way, at most half of them."""
    strength, half = min(strength, 1.0), depth // 2
    local = 1 - 0.75 * strength
    both = local * max(1 - strength, 0.5)
    return [local] * half + [both] * (depth - half)


#: Share of the patch tokens of each layer, fewer with more strength; with
#: none all of them.
SCHEDULES: dict[str, Callable[..., list[float]]] = {
    'power': power_shares,
    'constant': constant_shares,
    'local_global': local_global_shares,
}


def merging_layers(shares: Sequence[float], step: float) -> list[int]:
    """Layers that merge if merges of less than this share of the tokens there
    are wait, as they cost as much as others; one at least, if any is to."""
    layers, left = [], 1.0
    for layer, share in enumerate(shares):
        if share < left and left - share >= step * left:
            layers.append(layer)
            left = share
    return layers or [i for i, share in enumerate(shares) if share < 1][:1]


@dataclass(frozen=True)
class Schedule:
    """Tokens and operations of every layer.

    Attributes:
        shape (EncoderShape): The transformer.
        kind (str): Key of ``SCHEDULES``.
        power, first, step, between, compare: See
            :class:`~pm_seg.core.progressive.ProgressiveCompressor`.
        whole (bool): Whether patch tokens are read at the end; otherwise the
            last layer's MLP works on none, unless nothing merges at all.
    """

    shape: EncoderShape
    kind: str
    power: float
    first: int
    step: float
    between: bool
    compare: str
    whole: bool = True

    def __post_init__(self) -> None:
        check_option('schedule', self.kind, tuple(SCHEDULES))
        check_option('first', self.first, range(self.shape.depth))
        if not isinstance(self.power, Real) or not self.power > 0:
            raise ValueError(f'power={self.power!r} must be a number above 0')
        if not isinstance(self.step, Real) or not 0 <= self.step < 1:
            raise ValueError(f'step={self.step!r} must be a number in [0, 1)')

    def solve(self, keep: float) -> list[float]:
        """Shares of the patch tokens for a share of the dense layers' MACs,
        or ``ValueError`` if it is out of reach."""
        check_share('keep', keep)
        try:
            shares = self._solve(keep, range(self.shape.depth))
        except ValueError as error:
            raise ValueError(
                f'keep={keep} is out of reach of the schedule {self.kind!r}: '
                f'{error}; keep more'
                + ', or merge earlier: a lower first'
                * (self.kind == 'power' and self.first > 0)
            ) from None
        try:
            return self._solve(keep, merging_layers(shares, self.step))
        except ValueError:  # all that is to go goes in few layers
            return shares

    def _solve(self, keep: float, layers: Collection[int]) -> list[float]:
        """With merges before some layers only."""

        def shares(strength: float) -> list[float]:
            exact = SCHEDULES[self.kind](
                strength, self.shape.depth, self.power, self.first
            )
            held, left = [], 1.0
            for layer, share in enumerate(exact):
                left = share if layer in layers else left
                held.append(round(left * WHOLE) / WHOLE)
            return held

        def cost(shares: list[float]) -> float:
            macs = sum(load.macs for load in self.loads(shares))
            return macs / self.shape.dense_macs

        return solve(shares, cost, keep)

    def tokens(self, shares: Sequence[float], grid: Grid) -> list[int]:
        """Patch tokens that each layer's MLP works on, for any grid; above 64
        in multiples of 8, which products on accelerators need."""
        whole = left = grid[0] * grid[1]
        windows = (grid[0] // 2) * (grid[1] // 2)
        counts = []
        for layer, share in enumerate(shares):
            count = whole * share
            count = 8 * round(count / 8) if count > 64 else round(count)
            if self.kind == 'local_global' and layer < len(shares) // 2:
                merged = min((whole - count) // (WINDOW - 1), windows)
                count = whole - merged * (WINDOW - 1)
            halved = self.between and not self.in_windows(layer)
            least = left - left // 2 if halved else 1
            left = min(max(count, least), left)
            counts.append(left if share < 1 else whole)
        return counts

    def in_windows(self, layer: int) -> bool:
        """Whether a layer merges whole windows."""
        return self.kind == 'local_global' and layer == 0

    def at_once(self, layer: int, before: int, after: int) -> int:
        """How many of the patch tokens merge at once: half of them at most,
        or all that are to, in windows."""
        if self.in_windows(layer):
            return before - after
        return min(before - after, before // 2)

    def loads(self, shares: Sequence[float]) -> list[LayerLoad]:
        """What each layer works on and costs, on the native grid, comparing,
        merging and restoring included."""
        shape, loads = self.shape, []
        before, prefix, dims = shape.num_tokens, shape.num_prefix, shape.dims
        compared, found = COMPARES[self.compare](dims, shape.key_dims)
        for layer, after in enumerate(self.tokens(shares, shape.grid)):
            attended = before if self.between else after
            merged = after < shape.num_tokens
            kept = 0 if self.ends_early(layer, merged) else after
            macs = shape.cost(prefix + attended, prefix + kept)
            while before > after:
                merged = self.at_once(layer, before, after)
                pairs = (before // 2) * -(-before // 2)
                pairs = before if self.in_windows(layer) else pairs
                macs += before * found + pairs * compared
                # kept, moved from, moved to, added; restored
                rows = prefix + before + 2 * merged
                rows += self.whole * (prefix + before)
                macs += rows * (dims + shape.extra_dims)
                before -= merged
            loads.append(LayerLoad(attended, kept, macs))
        return loads

    def ends_early(self, layer: int, merged: bool) -> bool:
        """Whether the MLP of a layer works on prefix tokens alone."""
        last = layer == self.shape.depth - 1
        return last and merged and not (self.whole or self.between)


def solve(
    shares: Callable[[float], list[float]],
    cost: Callable[[list[float]], float],
    budget: float,
) -> list[float]:
    """The shares, for a strength from 0 to 1024, that cost as much as a
    budget allows, or ``ValueError`` if all of them cost more."""

    def fits(step: int) -> bool:
        return cost(shares(step / 2**40)) <= budget

    if fits(0):
        return shares(0.0)
    if not fits(2**50):
        raise ValueError(f'{cost(shares(1024.0)):.3f} is its least')
    return shares(bisect_left(range(2**50), True, key=fits) / 2**40)
