"""Pictures from a training run."""

from __future__ import annotations

from importlib import import_module

import cv2
import pytest
from helpers import small_config
from mmengine.runner import Runner

from pm_seg.engine import CompressionVisualizationHook
from pm_seg.registry import PACKAGES


def run(cfg, *backends: str) -> None:
    cfg.visualizer.vis_backends = [dict(type=kind) for kind in backends]
    cfg.experiment_name = cfg.work_dir.rsplit('/', 1)[-1]
    cfg.visualizer.name = cfg.experiment_name  # else that of the last run
    Runner.from_cfg(cfg).train()


def test_structure_groups_and_predictions_are_drawn(scenes, tmp_path) -> None:
    cfg = small_config(scenes, tmp_path / 'local', iters=3)
    cfg.train_cfg.val_interval = 1
    cfg.model.backbone.compression = dict(type='paper')  # it has scores
    cfg.custom_hooks[0].score_batches = 1
    cfg.custom_hooks.append(
        dict(type='CompressionVisualizationHook', interval=2, num_images=1)
    )
    run(cfg, 'LocalVisBackend')
    files = {p.name: p for p in tmp_path.rglob('compression_*.png')}
    names = sorted({name.rsplit('_', 1)[0] for name in files})
    assert len(names) == 4
    assert names[0].startswith('compression_groups_')
    assert names[1].startswith('compression_prediction_')
    assert names[2:] == ['compression_scores', 'compression_tokens']
    steps = {
        name: sorted(
            int(f.rsplit('_', 1)[1][:-4])
            for f in files
            if f.rsplit('_', 1)[0] == name
        )
        for name in names
    }
    assert steps['compression_tokens'] == steps['compression_scores'] == [0]
    # Before training, and after the second of three validations.
    assert len(steps[names[0]]) == 2 and steps[names[0]] == steps[names[1]]
    for path in files.values():
        assert cv2.imread(str(path)).std() > 5, path


def test_tensorboard(scenes, tmp_path) -> None:
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    cfg = small_config(scenes, tmp_path / 'board', iters=1)
    cfg.train_cfg.val_interval = 5
    cfg.custom_hooks.append(
        dict(type='CompressionVisualizationHook', num_images=1)
    )
    run(cfg, 'TensorboardVisBackend')
    (events,) = tmp_path.rglob('events.out.tfevents*')
    board = EventAccumulator(str(events.parent))
    board.Reload()
    tags = set(board.Tags()['images'])
    assert 'compression_tokens' in tags and len(tags) == 3


def test_without_a_structure_there_is_a_warning(
    scenes, tmp_path, caplog
) -> None:
    cfg = small_config(scenes, tmp_path / 'none', iters=1)
    cfg.model.backbone.compression = dict(type='paper')
    cfg.custom_hooks = [dict(type='CompressionVisualizationHook')]
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    cfg.experiment_name = cfg.visualizer.name = 'none'
    runner = Runner.from_cfg(cfg)
    with pytest.raises(RuntimeError, match='no structure yet'):
        runner.train()
    log = next((tmp_path / 'none').rglob('*.log')).read_text()
    assert 'no token groups to draw yet' in log


def test_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match='interval=-1'):
        CompressionVisualizationHook(interval=-1)
    with pytest.raises(ValueError, match='num_images=-2'):
        CompressionVisualizationHook(num_images=-2)


def test_it_serves_both_packages() -> None:
    for package in PACKAGES:
        registry = import_module(f'{package}.registry').HOOKS
        assert (
            registry.get('CompressionVisualizationHook')
            is CompressionVisualizationHook
        )
