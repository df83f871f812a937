"""Watching the groups of a running model."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, build

from pm_seg.core import GroupRecorder
from pm_seg.core.observe import patch_groups
from pm_seg.core.token_map import DenseTokenMap
from pm_seg.engine import compress

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def recorded(model, images=IMAGES) -> GroupRecorder:
    recorder = GroupRecorder(model.backbone.compressor)
    with recorder, torch.no_grad():
        model.backbone(images)
    assert model.backbone.compressor.observer is None
    return recorder


def compressed(**options):
    model = build(head=False, **options).eval()
    compress(model, [batch(0, 2)], 1)
    return model


@pytest.mark.parametrize('prune', [0.0, 0.25])
def test_static_groups_are_those_of_the_structure(prune: float) -> None:
    model = compressed(
        builder='row_window', restore='replace', prune=prune, layers=[0, 2]
    )
    recorder = recorded(model)
    assert recorder.grid == (4, 4)
    assert len(recorder.groups) == 3
    for found, expected in zip(
        recorder.groups, model.backbone.compressor.group
    ):
        assert torch.equal(found, expected[None])
    assert bool((recorder.groups[0] < 0).any()) == (prune > 0)


def test_adaptive_groups_follow_each_image() -> None:
    model = compressed(adapt=2)
    recorder = recorded(model)
    bound = []
    compressor = model.backbone.compressor
    for group, static, count in zip(
        recorder.groups, compressor.group, compressor.num_groups
    ):
        assert group.min() >= 0 and group.max() < count
        bound.append(len(group) == 2 and not torch.equal(group[0], static))
    assert any(bound)


def test_groups_of_another_grid() -> None:
    recorder = recorded(compressed(adapt=0), torch.randn(1, 3, 80, 48))
    assert recorder.grid == (5, 3)
    assert all(group.shape == (1, 15) for group in recorder.groups)


def test_layers_of_a_span_share_their_groups() -> None:
    recorder = recorded(compressed(span=2, adapt=0))
    first, second, third = recorder.groups
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_matching_differs_between_images() -> None:
    model = compressed(builder='matching')
    compressor = model.backbone.compressor
    recorder = recorded(model)
    assert len(recorder.groups) == 3
    counts = [group.shape[0] for group in recorder.groups]
    assert 2 in counts and set(counts) <= {1, 2}
    for group, count in zip(recorder.groups, compressor.num_groups):
        for row in group:
            assert sorted(row.unique().tolist()) == list(range(count))
    differing = [g for g in recorder.groups if len(g) == 2]
    assert any(not torch.equal(g[0], g[1]) for g in differing)


@pytest.mark.parametrize('kind', ['tome', 'algm'])
def test_merging_only_ever_joins_groups(kind: str) -> None:
    model = compressed(type=kind)
    compressor = model.backbone.compressor
    recorder = recorded(model)
    for group, count in zip(recorder.groups, compressor.tokens_after((4, 4))):
        assert group.shape == (2, 16)
        assert len(group[0].unique()) == count
    for before, after in zip(recorder.groups, recorder.groups[1:]):
        pairs = torch.stack([before[0], after[0]], 1).unique(dim=0)
        assert len(pairs) == len(before[0].unique())


def test_a_token_of_full_matrices_is_where_most_of_it_goes() -> None:
    merge = torch.eye(3)[:, [0, 1, 1, 2]] + 0.01
    live = torch.tensor([True, True, True, False])
    token_map = DenseTokenMap(merge, merge.T, live)
    assert patch_groups(token_map, 1).tolist() == [[0, 0, -1]]


def test_nothing_is_recorded_where_compression_is_off() -> None:
    model = compressed()
    with model.backbone.compressor.disabled():
        assert recorded(model).groups == []
