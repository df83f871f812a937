"""Shared fixtures: reference data, small models, small datasets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
#: Goldens, trained weights and CamVid; tests that need them are skipped
#: where they are missing.
SHARED = Path(os.environ.get('PM_SEG_SHARED', ROOT.parent / 'shared'))


def shared_path(relative: str) -> Path:
    """A file of the reference data, or skip the test."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f'reference data not found: {path} (set PM_SEG_SHARED)')
    return path


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset in ADE20K layout."""
    from pm_seg.datasets.scenes import write_scenes

    root = tmp_path_factory.mktemp('scenes')
    for _ in write_scenes(root, num_train=12, num_val=3):
        pass
    return root


def run_tool(
    *arguments: str | Path,
    cwd: Path | None = None,
    check: bool = True,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script as a user would, in a process of its own."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd or ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
    )
    if check and result.returncode:
        raise AssertionError(
            f'{arguments} failed:\n{result.stdout[-3000:]}\n'
            f'{result.stderr[-3000:]}'
        )
    return result
