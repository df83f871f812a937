"""How many tokens each layer gets: budgets over depth.

The paper sets one threshold on the scores of all layers ('global') or one in
each layer ('layer'), which says what a token is worth within its layer but
not what compressing the layer costs. 'loss' measures just that: with one
layer at a time compressed to a few levels, how far do the predictions move
from those of the dense model? A budget of operations is then spent where it
saves the most loss. Losses of single layers are taken to add up, which was
checked on CamVid: the structure found that way is better than a flat one and
than every number of dense blocks in front of equally compressed ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BUDGETS = ('loss', 'global', 'layer')

#: Shares of the patch tokens at which a layer's loss is measured.
LEVELS = (0.75, 0.5, 0.25, 0.1)

_STEPS = 4000  # resolution of the budget
_TINY = 1e-12


def loss_curve(losses: Sequence[float], shares: np.ndarray) -> np.ndarray:
    """Loss at any share of kept tokens, from the measured levels.

    A power law in the share of dropped tokens between two levels, and from
    the first level down to 0: losses grow faster than linearly, and straight
    lines would make the levels the best choices everywhere. Never lower with
    fewer tokens.

    Args:
        losses (Sequence[float]): Loss at each of ``LEVELS``, >= 0.
        shares (np.ndarray): Shares within [LEVELS[-1], 1].
    """
    known = np.log(np.maximum.accumulate(np.maximum(losses, _TINY)))
    levels = np.log(1 - np.array(LEVELS))
    dropped = np.log(np.maximum(1 - shares, _TINY))
    curve = np.interp(dropped, levels, known)
    slope = (known[1] - known[0]) / (levels[1] - levels[0])
    below = known[0] + max(slope, 1.0) * (dropped - levels[0])
    curve = np.where(dropped < levels[0], below, curve)
    return np.where(shares >= 1, 0.0, np.exp(curve))


def spend(
    losses: np.ndarray, costs: np.ndarray, limit: float
) -> list[int] | None:
    """Choose one option for each layer: least total loss within a budget.

    The multiple-choice knapsack problem, solved by dynamic programming over
    the budget in steps of 1/4000.

    Args:
        losses (np.ndarray): (layers, options).
        costs (np.ndarray): (layers, options), > 0.
        limit (float): Upper bound of the total cost.

    Returns:
        list[int]: The option of each layer; None if even the cheapest ones
        are over the limit.
    """
    units = np.floor(costs / limit * _STEPS + 1e-6).astype(int)
    best = np.zeros(_STEPS + 1)
    taken = []
    for loss, unit in zip(losses, units):
        table = np.full((len(loss), _STEPS + 1), np.inf)
        for option, (value, used) in enumerate(zip(loss, unit)):
            if used <= _STEPS:
                table[option, used:] = best[: _STEPS + 1 - used] + value
        taken.append(table.argmin(0))
        best = table.min(0)
    rows = range(len(units))
    for budget in range(_STEPS, 0, -1):
        if not np.isfinite(best[budget]):
            break
        left, chosen = budget, []
        for row in reversed(rows):
            chosen.insert(0, int(taken[row][left]))
            left -= units[row, chosen[0]]
        # The steps are rounded down, the limit is not.
        if costs[rows, chosen].sum() <= limit * (1 + 1e-9):
            return chosen
    return None


def allocate(
    losses: Sequence[Sequence[float]],
    num_tokens: int,
    keep: float,
    cost: tuple[float, float],
    overhead: float = 0.0,
    num_prefix: int = 0,
    group_overhead: float = 0.0,
) -> list[int]:
    """Tokens of each token map, at the cost of a flat ``keep``.

    Args:
        losses (Sequence[Sequence[float]]): Measured losses at ``LEVELS``,
            one row for each token map.
        num_tokens (int): N.
        keep (float): All maps together cost what they would with
            ``int(keep * N)`` groups each.
        cost (tuple[float, float]): a and b of the cost ``a T + b T^2`` of
            running on T tokens.
        overhead (float): Cost of merging and restoring, saved where all
            tokens are kept.
        num_prefix (int): P, part of T.
        group_overhead (float): What comes on top for each group.

    Returns:
        list[int]: Groups of each map; N where it is best left dense.
    """
    flat = max(int(num_tokens * keep), 1)
    counts = np.arange(LEVELS[-1], 1, 0.0125) * num_tokens
    counts = np.unique(np.append(np.ceil(counts), [flat, num_tokens]))

    def price(count: np.ndarray) -> np.ndarray:
        total = count + num_prefix
        run = cost[0] * total + cost[1] * total**2
        extra = overhead + group_overhead * count
        return run + extra * (count < num_tokens)

    shares = np.clip(counts / num_tokens, LEVELS[-1], 1)
    curves = np.stack([loss_curve(row, shares) for row in losses])
    prices = np.tile(price(counts), (len(losses), 1))
    limit = len(losses) * float(price(np.array(float(flat))))
    chosen = spend(curves, prices, limit)
    return [int(counts[i]) for i in chosen]
