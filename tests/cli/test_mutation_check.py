"""The mutation check runs where the core's tests do, without OpenMMLab."""

from __future__ import annotations

import pytest
from helpers import run_tool


@pytest.mark.slow
def test_a_fault_of_the_core_is_caught() -> None:
    """In a copy of what the core's tests need, which pass without it."""
    out = run_tool(
        'tools/lab/mutation_check.py', '--only', 'merging',
        '--match', 'means ignore sizes', fresh=True,
    )  # fmt: skip
    assert 'caught: merging, means ignore sizes' in out.stdout
    assert '1 of 1 faults caught' in out.stdout
