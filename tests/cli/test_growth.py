"""The measurements of growth: figures are fitted, nothing leaks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import growth
import pytest
import torch
from growth_figures import plot_leak
from growth_leak import leak
from helpers import ROOT, run_tool


def rows(power: float) -> list[dict]:
    return [
        dict(
            quantity='x', along='size', size=size, tokens=(size // 16) ** 2,
            depth=2, batch=1, seconds=1e-6 * size ** (2 * power), mib=3.0,
        )
        for size in (256, 512, 1024, 2048)
    ]  # fmt: skip


@pytest.mark.parametrize('power', [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power: float) -> None:
    found = growth.exponent(rows(power), 'size', 'seconds')
    assert found == pytest.approx(power)
    assert growth.exponent(rows(power), 'size', 'mib') == pytest.approx(0)
    assert math.isnan(growth.exponent(rows(power), 'depth', 'seconds'))
    summary = growth.exponents(rows(power))[0]
    assert summary['size'] == 2048 and summary['mib'] == 3.0


@pytest.mark.parametrize('name', list(growth.QUANTITIES))
def test_each_quantity_is_measured(name: str) -> None:
    row = growth.measure_one(name, 64, 2, 1)
    assert row['seconds'] > 0 and row['mib'] >= 0 and row['tokens'] == 16


def test_attention_is_left_out_and_comes_back() -> None:
    query = torch.randn(1, 1, 4, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    with growth.without_attention():
        growth.backbone(64, 2, growth.OURS)(torch.randn(1, 3, 64, 64))
        out = growth.F.scaled_dot_product_attention(query, query, query + 1)
    assert torch.equal(out, query + 1)
    assert growth.F.scaled_dot_product_attention is attend


def test_memory_stays_bounded_over_images_of_many_sizes(
    tmp_path: Path,
) -> None:
    found = leak(80)
    assert found['grids'] > 20
    assert len(found['mib']) == 80
    assert found['mib'][-1] - found['mib'][40] < 40
    picture = tmp_path / 'a' / 'leak.png'
    plot_leak(found, picture)
    assert picture.stat().st_size > 5_000


def test_the_command_writes_a_table_and_a_picture(tmp_path: Path) -> None:
    out, picture = tmp_path / 'a' / 'g.json', tmp_path / 'b' / 'g.png'
    names = ['groups from scores, paper', 'scoring']
    run = run_tool(
        ROOT / 'tools/lab/growth.py', '--sizes', '64', '512', '--depths', '1',
        '--batches', '1', '2', '--only', *names, '--out', out,
        '--plot', picture,
    )  # fmt: skip
    assert names[0] in run.stdout
    body = json.loads(out.read_text())
    assert [row['size'] for row in body['result']][:3] == [64, 512, 512]
    assert {row['quantity'] for row in body['exponents']} == set(names)
    assert picture.stat().st_size > 10_000
