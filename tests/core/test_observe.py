"""Watching the groups of a running model."""

from __future__ import annotations

import pytest
import torch

from pm_seg.core import (
    Compressor,
    EncoderShape,
    GroupRecorder,
    LayerCost,
    StaticCompressor,
)

GRID = (4, 4)
SHAPE = EncoderShape(3, GRID, 1, 4, 4, LayerCost(1.0, 1.0, 1.0))


def static(**options) -> StaticCompressor:
    torch.manual_seed(0)
    module = StaticCompressor(SHAPE, keep_rate=0.5, **options)
    module.set_scores(torch.rand(3, 16) + 0.01)
    return module


def recorded(module: Compressor, grid=GRID) -> GroupRecorder:
    recorder = GroupRecorder(module)
    x = torch.randn(2, 1 + grid[0] * grid[1], 4)
    with recorder, torch.no_grad():
        module.run([torch.sin] * 3, x, grid)
    assert module.observer is None
    return recorder


@pytest.mark.parametrize('prune_rate', [0.0, 0.25])
def test_static_groups_are_those_of_the_structure(prune_rate: float) -> None:
    module = static(prune_rate=prune_rate, layers=[0, 2])
    recorder = recorded(module)
    assert recorder.grid == GRID
    assert len(recorder.groups) == 3
    for found, expected in zip(recorder.groups, module.group):
        assert torch.equal(found, expected[None])
    assert bool((recorder.groups[0] < 0).any()) == (prune_rate > 0)


def test_groups_of_full_matrices_start_as_those_of_the_structure() -> None:
    module = static(matrices='dense', num_groups=[9, 8, 7], prune_rate=0.25)
    for found, expected in zip(recorded(module).groups, module.group):
        assert torch.equal(found, expected[None])


def test_groups_of_another_grid() -> None:
    recorder = recorded(static(), (5, 3))
    assert recorder.grid == (5, 3)
    for group in recorder.groups:
        assert group.shape == (1, 15)
        assert len(group.unique()) > 4 and group.max() < 8


def test_the_last_run_is_kept() -> None:
    module = static()
    x = torch.randn(1, 17, 4)
    with GroupRecorder(module) as recorder:
        for _ in range(2):
            module.run([torch.sin] * 3, x, GRID)
    assert len(recorder.groups) == 3
