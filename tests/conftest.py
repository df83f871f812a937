"""Shared fixtures."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from pathlib import Path

# Several test processes (pytest -n) share the cores, with the tools they run.
if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ['OMP_NUM_THREADS'] = '1'

import paths  # noqa: F401
import pytest
import torch
from hypothesis import Phase, settings

with suppress(ModuleNotFoundError):  # tests/core needs torch alone
    import unformatted  # noqa: F401

# The same examples in every run; other ones, without end, are drawn with
# pytest --hypothesis-profile=explore.
settings.register_profile(
    'fixed', derandomize=True, deadline=None, database=None
)
settings.register_profile('explore', deadline=None, print_blob=True)
# Whether a test fails is enough, not its smallest example.
settings.register_profile(
    'brief', settings.get_profile('fixed'), phases=[Phase.generate]
)
settings.load_profile('fixed')


def pytest_collection_finish() -> None:
    """What is imported stays: mmengine collects garbage for each dataset,
    and need not look for it there."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset in ADE20K layout."""
    from make_scenes import write_scenes

    root = tmp_path_factory.mktemp('scenes')
    for _ in write_scenes(root, num_train=12, num_val=3):
        pass
    return root
