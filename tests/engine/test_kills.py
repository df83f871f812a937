"""Runs killed at random moments end as they would have."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import ROOT, run_tool


@pytest.mark.slow
def test_killed_at_random(tmp_path: Path) -> None:
    out = run_tool(
        ROOT / 'tests/kill_runs.py', '--runs', '4', '--seed', '1',
        cwd=tmp_path, env=dict(PYTHONPATH=f'{ROOT}', OMP_NUM_THREADS='1'),
    )  # fmt: skip
    assert '4 of 4 ended identical' in out.stdout
