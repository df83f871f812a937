"""Budgets over depth."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pm_seg.core.budget import LEVELS, allocate, loss_curve, spend


def test_curve_meets_the_measurements_and_never_falls() -> None:
    losses = [0.01, 0.04, 0.03, 0.2]
    at_levels = loss_curve(losses, np.array(LEVELS))
    np.testing.assert_allclose(at_levels, [0.01, 0.04, 0.04, 0.2])
    curve = loss_curve(losses, np.linspace(1, 0.1, 50))
    assert curve[0] == 0 and (np.diff(curve) >= 0).all()
    assert not loss_curve([0.0] * 4, np.array([0.5])) > 1e-9


def test_curve_follows_a_power_law() -> None:
    dropped = 1 - np.array(LEVELS)
    shares = np.linspace(0.1, 0.99, 30)
    curve = loss_curve(3 * dropped**2, shares)
    np.testing.assert_allclose(curve, 3 * (1 - shares) ** 2, rtol=1e-6)


@given(st.integers(0, 500), st.sampled_from([0.3, 0.6, 0.9]))
@settings(max_examples=40, deadline=None)
def test_spend_is_the_best_of_all_choices(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    losses, costs = rng.random((4, 3)), rng.integers(1, 20, (4, 3)) * 1.0
    limit = float(np.rint(costs.sum(0).max() * share))
    totals = {
        choice: (costs[range(4), choice].sum(), losses[range(4), choice].sum())
        for choice in product(range(3), repeat=4)
    }
    allowed = [loss for cost, loss in totals.values() if cost <= limit]
    chosen = spend(losses, costs, limit)
    if not allowed:
        assert chosen is None
        return
    cost, loss = totals[tuple(chosen)]
    assert cost <= limit
    # Costs are counted in steps of 1/4000 of the limit.
    assert loss <= min(allowed) + 0.05


@given(
    st.sampled_from([0.05, 0.2, 0.5, 0.7, 0.95, 1.0]),
    st.integers(1, 24),
    st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_allocation_costs_no_more_than_flat(
    keep: float, layers: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.1, 3, (layers, 1))
    losses = (scale * (1 - np.array(LEVELS)) ** 2).tolist()
    cost, tokens, prefix, overhead = (442.0, 0.4), 660, 1, 4000.0

    def price(count: int) -> float:
        total = count + prefix
        used = cost[0] * total + cost[1] * total**2
        return used + overhead * (count < tokens)

    counts = allocate(losses, tokens, keep, cost, overhead, prefix)
    assert len(counts) == layers and all(1 <= n <= tokens for n in counts)
    flat = layers * price(int(keep * tokens))
    assert sum(map(price, counts)) <= flat * (1 + 1e-9)
    if 0.15 < keep < 1 and layers > 3:
        assert sum(map(price, counts)) > 0.9 * flat


def test_sensitive_layers_keep_more() -> None:
    drop = 1 - np.array(LEVELS)
    losses = [(scale * drop**2).tolist() for scale in (8, 1, 1, 0.1)]
    counts = allocate(losses, 1000, 0.5, (1.0, 0.001))
    assert counts[0] > counts[1] > counts[3]
    assert counts[1] == pytest.approx(counts[2], abs=30)
    assert allocate(losses, 1000, 0.5, (1.0, 0.001)) == counts
