"""The measurements of growth: figures are fitted, nothing leaks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_tool

from pm_seg.cli import growth
from pm_seg.core import TokenCompressor


def rows(power: float) -> list[dict]:
    return [
        dict(
            quantity='x', along='size', size=size, tokens=(size // 16) ** 2,
            depth=2, batch=1, seconds=1e-6 * size ** (2 * power), mib=3.0,
        )
        for size in (256, 512, 1024, 2048)
    ]  # fmt: skip


@pytest.mark.parametrize('power', [0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(power: float) -> None:
    assert growth.exponent(rows(power), 'size', 'seconds') == pytest.approx(
        power
    )
    assert growth.exponent(rows(power), 'size', 'mib') == pytest.approx(0)
    assert math.isnan(growth.exponent(rows(power), 'depth', 'seconds'))
    summary = growth.exponents(rows(power))[0]
    assert summary['size'] == 2048 and summary['mib'] == 3.0


@pytest.mark.parametrize('name', list(growth.QUANTITIES))
def test_each_quantity_is_measured(name: str) -> None:
    row = growth._measure(name, 64, 2, 1)
    assert row['seconds'] > 0 and row['mib'] >= 0 and row['tokens'] == 16


def test_attention_can_be_left_out() -> None:
    """Nothing else changes, and it is back afterwards."""
    query = torch.randn(1, 1, 4, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    with growth._without_attention():
        model = growth._backbone(64, 1, None)
        model(torch.randn(1, 3, 64, 64))
        out = growth.F.scaled_dot_product_attention(query, query, query + 1)
    assert torch.equal(out, query + 1)
    assert growth.F.scaled_dot_product_attention is attend


def test_memory_and_maps_stay_bounded(tmp_path: Path) -> None:
    """More grids than are kept, again and again."""
    found = growth.leak(120)
    limit = TokenCompressor.max_cached_layouts
    assert found['grids'] > limit
    assert max(found['layouts']) == limit
    assert len(found['mib']) == 120
    assert found['mib'][-1] - found['mib'][60] < 40
    picture = tmp_path / 'a' / 'leak.png'
    growth.plot_leak(found, picture)
    assert picture.stat().st_size > 5_000


def test_command_writes_table_and_pictures(tmp_path: Path) -> None:
    out, picture = tmp_path / 'a' / 'g.json', tmp_path / 'b' / 'g.png'
    run = run_tool(
        ROOT / 'tools/growth.py', '--sizes', '64', '512', '--depths', '1',
        '--batches', '1', '2', '--only', 'structure search', 'scoring',
        '--out', out, '--plot', picture,
    )  # fmt: skip
    assert 'structure search' in run.stdout
    body = json.loads(out.read_text())
    assert [row['size'] for row in body['result']][:3] == [64, 512, 512]
    assert {row['quantity'] for row in body['exponents']} == {
        'structure search',
        'scoring',
    }
    assert picture.stat().st_size > 10_000
