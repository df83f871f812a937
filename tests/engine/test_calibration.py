"""What a few images say about how to merge."""

from __future__ import annotations

import pytest
import torch
from tiny import batch, build

from pm_seg.engine import calibration
from pm_seg.engine.calibration import (
    SEARCH,
    choose_settings,
    fit_importance,
)
from pm_seg.engine.scoring import uncompressed
from pm_seg.models.distillation import soft_target_loss

BATCHES = [batch(0, 2), batch(2, 2)]


def prepared(**options) -> torch.nn.Module:
    model = build(**options).eval()
    for parameter in model.parameters():  # tokens differ, as trained ones do
        if parameter.dim() > 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if model.backbone.compressor.calibrates:
        fit_importance(model, BATCHES)
    return model


@torch.no_grad()
def loss(model) -> float:
    total = 0.0
    for data in BATCHES:
        images = model.data_preprocessor(data, training=True)['inputs']
        with uncompressed(model):
            dense = model(images, mode='tensor')
        found = model(images, mode='tensor')
        total += soft_target_loss(found, dense, 1.0).item()
    return total


def test_the_best_settings_are_kept_at_the_same_cost() -> None:
    model = prepared()
    compressor = model.backbone.compressor
    before, seen = compressor.schedule.power, []
    start = (before, compressor.gain.detach().clone())
    chosen = choose_settings(model, BATCHES, lambda *steps: seen.append(steps))
    total = sum(map(len, SEARCH.values())) - len(SEARCH) + 1
    assert seen == [(i, total) for i in range(total + 1)]
    assert compressor.schedule.power == before * chosen['power']
    assert float(compressor.comparison.strength) == pytest.approx(
        chosen['strength']
    )
    assert (compressor.gain == chosen['gain']).all()
    assert compressor.keep == 0.5 and compressor.share <= 0.5
    # Nothing of what was tried last, with the others chosen, is better.
    best = loss(model)
    name = list(SEARCH)[-1]
    for value in SEARCH[name]:
        tried = {**chosen, name: value}
        assert calibration._apply([compressor], [start], tried)
        assert loss(model) >= best - 1e-6


def test_gains_are_not_tried_where_nothing_is_restored() -> None:
    model = prepared(restore='replace')
    assert not model.backbone.compressor.gain.requires_grad
    seen = []
    chosen = choose_settings(model, BATCHES, lambda *steps: seen.append(steps))
    others = len(SEARCH['strength']) + len(SEARCH['power']) - 1
    assert seen[-1] == (others, others) and chosen['gain'] == 1.0


def test_powers_out_of_reach_are_passed_over(monkeypatch) -> None:
    """At the lowest budget all tokens go as early as they may."""
    search = {name: values[:1] for name, values in SEARCH.items()}
    search['power'] = (1.0, 0.01, 100.0)
    monkeypatch.setattr(calibration, 'SEARCH', search)
    model = prepared(keep=0.47)
    chosen = choose_settings(model, BATCHES)
    assert chosen['power'] in (1.0, 0.01)
    assert model.backbone.compressor.share <= 0.47


def test_the_kinds_of_peers_are_left_alone() -> None:
    model = prepared(type='tome', keep=0.7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert not model.backbone.compressor.calibrated
    choose_settings(model, BATCHES)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
