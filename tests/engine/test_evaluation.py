"""Accuracy and costs of dense and compressed models."""

from __future__ import annotations

import pytest
import torch
from helpers import small_config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS
from tiny import batch, build

from pm_seg.engine import Measuring, compress
from pm_seg.engine.evaluation import compare_macs, compare_speed, evaluate
from pm_seg.engine.scoring import uncompressed
from pm_seg.visualization.layers import module_reports


@pytest.mark.parametrize('kind', ['pm', 'paper', 'tome', 'algm'])
def test_the_report_accounts_for_what_compression_saves(kind: str) -> None:
    model = build(type=kind, **{} if kind == 'paper' else dict(keep=0.75))
    compress(model.eval(), [batch(0, 2)], measuring=Measuring(1, 0))
    (report,) = module_reports(model).values()
    assert report.macs == sum(layer.macs for layer in report.layers)
    saved = report.shape.dense_macs - report.macs
    # A decoder on the groups of the encoder saves more.
    whole = compare_macs(model)
    assert whole['dense'] - whole['compressed'] > saved * 0.98
    model.decode_head.follow_groups = False
    encoder = compare_macs(model)
    assert encoder['dense'] == whole['dense']
    assert encoder['dense'] - encoder['compressed'] == pytest.approx(
        saved, rel=0.02
    )
    follows = whole['compressed'] < encoder['compressed']
    assert follows == (kind != 'paper'), 'its groups are not of images'


def test_speed_is_measured_in_turns() -> None:
    model = build().train()
    compress(model)
    seconds = compare_speed(model, rounds=3)
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert min(map(min, seconds.values())) > 0 and model.training


def test_metrics_are_those_of_a_run(scenes, tmp_path) -> None:
    cfg = small_config(scenes, tmp_path)
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model)
    model.init_weights()
    compress(model)
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
