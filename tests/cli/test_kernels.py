"""What a merge launches, counted."""

from __future__ import annotations

from pathlib import Path

import kernels
import pytest
import torch
from kernels import count_kernels

from pm_seg.core import EncoderShape, LayerCost

MODEL = """
custom_imports = dict(imports=['pm_seg'])
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    backbone=dict(
        type='PMVisionTransformer', img_size=(64, 96), embed_dims=48,
        num_layers=6, num_heads=3, compression=dict(type='tome')))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / 'tiny.py'
    path.write_text(MODEL)
    return path


def test_kernels_are_counted_part_by_part(
    config: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(kernels, 'compiled_launches', lambda *args: (3, 10**6))
    rows = kernels.main([str(config), '--keep', '0.6'])
    parts = {row['part']: row for row in rows}
    assert list(parts) == ['find groups', 'merge', 'restore']
    assert parts['restore']['names'] == dict(
        sub=1, mul=1, index_select=1, add=1
    )
    for part in rows:
        assert part['eager'] == sum(part['names'].values()) > 0
        assert part['kernels'] >= part['eager'] and part['batch'] == 1
    # In and out: what was before, gained and added; what gains, merged, after.
    moved = parts['restore']['bytes']
    assert moved > parts['merge']['bytes'] > 3 * 25 * 48 * 4
    text = capsys.readouterr().out
    assert 'together' in text and 'batch 1' in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.slow
def test_compiled_kernels_and_their_bytes() -> None:
    """One kernel that reads two tensors and writes one."""
    x = torch.randn(64, 64)
    launches, moved = kernels.compiled_launches(
        lambda x: (x.sin() + x.T).cos(), x
    )
    assert launches == 1 and moved in (2 * 4 * 64**2, 3 * 4 * 64**2)


def test_kernels_that_cannot_be_compiled_are_not_counted(monkeypatch) -> None:
    monkeypatch.setattr(torch, 'compile', None)
    shape = EncoderShape(4, (8, 8), 1, 64, 32, LayerCost(16384, 32768, 128))
    assert {row['compiled'] for row in count_kernels(shape)} == {None}
