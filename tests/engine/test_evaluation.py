"""Accuracy and costs of dense and compressed models."""

from __future__ import annotations

import pytest
import torch
from helpers import small_config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from tiny import batch, build

from pm_seg.engine import compress
from pm_seg.engine.evaluation import compare_macs, compare_speed, evaluate
from pm_seg.engine.report import describe, module_reports
from pm_seg.engine.scoring import uncompressed


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(adapt=0),
        dict(builder='matching'),
        dict(builder='row_window', restore='replace', prune=0.2),
        dict(type='tome', head=False),
        dict(type='algm', head=False),
    ],
    ids=['adaptive', 'static', 'matching', 'paper', 'tome', 'algm'],
)
def test_the_report_accounts_for_what_compression_saves(options) -> None:
    model = build(**options).eval()
    compress(model, [batch(0, 2)], 1)
    macs = compare_macs(model)
    reports = module_reports(model).values()
    saved = sum(r.dense_macs - r.macs for r in reports)
    assert saved == pytest.approx(macs['dense'] - macs['compressed'], rel=0.02)
    assert 0 < macs['compressed'] < macs['dense']
    for report in reports:
        assert report.macs == sum(layer.macs for layer in report.layers)
    assert max(map(len, describe(model).splitlines())) <= 80


def test_speed_is_measured_in_turns() -> None:
    model = build().train()
    compress(model, [batch(0, 2)], 1)
    seconds = compare_speed(model, rounds=3)
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert min(map(min, seconds.values())) > 0 and model.training


def test_metrics_are_those_of_a_run(scenes, tmp_path) -> None:
    cfg = small_config(scenes, tmp_path)
    cfg.model.backbone.compression.layers = [0, 1]
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    model.init_weights()
    compress(model, cfg.train_dataloader, 1)
    seen = []
    found = evaluate(model, cfg, lambda *steps: seen.append(steps))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'pm.pth')
    cfg.load_from = str(tmp_path / 'pm.pth')
    cfg.custom_hooks = []
    expected = Runner.from_cfg(cfg).val()
    assert found == pytest.approx(expected)
    with uncompressed(model):
        assert evaluate(model, cfg) != found
