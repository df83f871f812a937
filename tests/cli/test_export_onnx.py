"""ONNX and torch.export."""

from __future__ import annotations

import io
from pathlib import Path

import onnx
import pytest
import torch
from helpers import needs_exporter, run_tool
from tiny import batch, build

from pm_seg.cli.export_onnx import (
    Predictor,
    check_exporter,
    compare,
    export,
)
from pm_seg.engine import Measuring, compress

CASES = {
    'dense': None,
    'ours': {},
    'paper': dict(type='paper', keep_rate=0.6, prune_rate=0.2),
    'tome': dict(type='tome'),
    'algm': dict(type='algm'),
}


def predictor(case: str, resize: bool = True) -> Predictor:
    options = CASES[case]
    if options is None:
        model = build(compression=False)
    else:
        model = build(**options)
        compress(
            model,
            [batch(0, 2), batch(2, 2)],
            measuring=Measuring(score_batches=2, calib_batches=1),
        )
    return Predictor(model, resize).eval()


@needs_exporter
@pytest.mark.parametrize('case', list(CASES))
def test_onnxruntime_agrees(case: str, tmp_path: Path) -> None:
    model = predictor(case)
    path = tmp_path / 'new' / 'model.onnx'
    images = torch.randn(2, 3, 64, 64)
    export(model, images, path)
    assert compare(model, images, path) < 1e-4
    names = {node.op_type for node in onnx.load(path).graph.node}
    if case != 'algm':  # its windows are chosen by a scatter
        assert not [name for name in names if 'Scatter' in name]
    assert [p.name for p in path.parent.iterdir()] == ['model.onnx']


@needs_exporter
@pytest.mark.parametrize('case', ['ours', 'paper'])
def test_another_size(case: str, tmp_path: Path) -> None:
    model = predictor(case, resize=False)
    images = torch.randn(1, 3, 97, 130)
    export(model, images, tmp_path / 'model.onnx')
    assert compare(model, images, tmp_path / 'model.onnx') < 1e-4


@pytest.mark.parametrize('case', ['ours', 'paper'])
def test_torch_export_round_trip(case: str) -> None:
    model = predictor(case)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=False)
        stream = io.BytesIO()
        torch.export.save(program, stream)
        stream.seek(0)
        again = torch.export.load(stream).module()
        torch.testing.assert_close(again(images), model(images))


@needs_exporter
def test_nothing_is_left_of_a_failed_export(tmp_path: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError('broken')

    with pytest.raises(RuntimeError, match='broken'):
        export(Broken(), torch.zeros(1, 3, 8, 8), tmp_path / 'x.onnx')
    assert list(tmp_path.iterdir()) == []


def test_help() -> None:
    text = run_tool('tools/export_onnx.py', '--help').stdout
    assert 'onnxruntime' in text and '--tolerance' in text


def test_old_torch_is_named(monkeypatch) -> None:
    """Torch 2.4 has another ``torch.onnx.export``."""
    monkeypatch.setattr(torch.onnx, 'export', lambda model, args, f: None)
    with pytest.raises(SystemExit, match=r'came with torch 2\.5'):
        check_exporter()
