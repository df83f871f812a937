"""Compressors by name."""

from __future__ import annotations

import pytest
from toy import shape_of

from pm_seg.core import (
    CLASSIFICATION,
    PRESETS,
    ProgressiveCompressor,
    StaticCompressor,
    make_compressor,
)
from pm_seg.core.presets import nearest

SHAPE = shape_of()


def test_the_default_merges_progressively() -> None:
    module = make_compressor({}, SHAPE)
    assert type(module) is ProgressiveCompressor
    assert module.keep == 0.5 and module.restore == 'residual'
    assert module.calibrates and not module.needs_scores
    assert not module.compressed, 'until somebody settles it'
    assert module.has_structure


@pytest.mark.parametrize(
    ('kind', 'compare', 'schedule'),
    [('tome', 'keys', 'constant'), ('algm', 'tokens', 'local_global')],
)
def test_peers_are_settings_of_the_same_class(kind, compare, schedule) -> None:
    module = make_compressor(dict(type=kind, keep=0.7), SHAPE)
    assert type(module) is ProgressiveCompressor
    assert (
        module.schedule.compare == compare and module.schedule.kind == schedule
    )
    assert module.schedule.between and module.restore == 'replace'
    assert module.size_aware == (kind == 'tome') and not module.calibrates
    ours = dict(type=kind, keep=0.7, restore='residual', between=False)
    module = make_compressor(ours, SHAPE)
    assert module.restore == 'residual' and module.schedule.compare == compare
    assert not module.schedule.between


def test_the_paper_is_a_class_of_its_own() -> None:
    module = make_compressor(dict(type='paper', keep_rate=0.6), SHAPE)
    assert type(module) is StaticCompressor and module.needs_scores


def test_defaults_are_for_our_own_kind_alone() -> None:
    module = make_compressor(dict(keep=0.8), SHAPE, CLASSIFICATION)
    assert module.schedule.compare == CLASSIFICATION['compare'] == 'keys'
    assert module.schedule.power == CLASSIFICATION['power']
    chosen = dict(keep=0.8, compare='tokens')
    module = make_compressor(chosen, SHAPE, CLASSIFICATION)
    assert module.schedule.compare == 'tokens'
    assert chosen == dict(keep=0.8, compare='tokens'), 'left as it was'
    for kind in ('tome', 'algm', 'paper'):
        plain, other = (
            make_compressor(dict(type=kind), SHAPE, defaults).extra_repr()
            for defaults in ({}, CLASSIFICATION)
        )
        assert plain == other


@pytest.mark.parametrize(
    ('compression', 'parts'),
    [
        (dict(type='tomee'), ["type='tomee'", "'tome'?", 'pm, paper']),
        (dict(kep=0.5), ['kep=0.5', "did you mean 'keep'?", "type='pm'"]),
        (
            dict(type='paper', keep=0.5),
            ['keep=0.5', "did you mean 'keep_rate'?", "type='paper'"],
        ),
        (dict(zzz=1), ['zzz=1', 'choose one of keep, schedule']),
        (dict(shape=1), ['unknown option shape=1']),
        (dict(type=None), ['type=None']),
    ],
)
def test_unknown_names_get_the_nearest_one(compression, parts) -> None:
    with pytest.raises(ValueError) as error:
        make_compressor(compression, SHAPE)
    for part in parts:
        assert part in str(error.value)
    assert '\n' not in str(error.value)


def test_nearest() -> None:
    assert nearest('keeep', ['keep', 'power']).startswith("did you mean 'keep")
    assert nearest('x', ['keep', 'power']) == 'choose one of keep, power'
    assert set(PRESETS) == {'pm', 'paper', 'tome', 'algm'}
