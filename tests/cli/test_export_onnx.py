"""ONNX and torch.export."""

from __future__ import annotations

import io
from pathlib import Path

import onnx
import pytest
import torch
from helpers import needs_exporter, run_tool, slow
from tiny import batch, build, build_from, config

from pm_seg.cli.export_onnx import (
    Predictor,
    check_exporter,
    compare,
    export,
    main,
)
from pm_seg.engine.compression import Measuring, compress

CASES = {
    'dense': None,
    'ours': dict(keep=0.5, first=0),
    'replace': dict(keep=0.5, first=0, restore='replace', size_aware=False),
    'paper': dict(type='paper', prune_rate=0.1),
    'tome': dict(type='tome', keep=0.6),
    'algm': dict(type='algm', keep=0.6),
}


def predictor(case: str, resize: bool = True) -> Predictor:
    options = CASES[case]
    cfg = config(options)
    cfg['backbone'].update(num_layers=2)
    cfg['decode_head'].update(num_layers=1)
    model = build_from(cfg)
    if options is not None:
        measuring = Measuring(score_batches=2, calib_batches=2)
        compress(model, [batch(0, 2), batch(2, 2)], measuring=measuring)
    if case == 'ours':  # the sum with importance too
        model.backbone.compressor.set_strength(0.2)
    return Predictor(model, resize).eval()


@needs_exporter
@pytest.mark.parametrize(
    'case',
    [slow(case) if case in ('dense', 'replace') else case for case in CASES],
)
def test_onnxruntime_agrees_without_scatter_operators(
    case: str, tmp_path: Path
) -> None:
    model = predictor(case)
    path = tmp_path / 'new' / 'model.onnx'
    images = torch.randn(2, 3, 64, 64)
    export(model, images, path)
    assert compare(model, images, path) < 1e-4
    names = {node.op_type for node in onnx.load(path).graph.node}
    if case != 'algm':  # windows are scattered
        assert not [name for name in names if 'Scatter' in name]
    assert [p.name for p in path.parent.iterdir()] == ['model.onnx']


@needs_exporter
@pytest.mark.parametrize('case', ['ours', 'paper'])
def test_another_size_is_exported(case: str, tmp_path: Path) -> None:
    model = predictor(case, resize=False)
    images = torch.randn(1, 3, 97, 130)
    export(model, images, tmp_path / 'model.onnx')
    assert compare(model, images, tmp_path / 'model.onnx') < 1e-4


@pytest.mark.parametrize('case', [slow('ours'), 'paper', slow('tome')])
def test_an_exported_program_survives_saving(case: str) -> None:
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


@needs_exporter
def test_the_tool_writes_a_compressed_model_and_says_how_far_it_is_off(
    tmp_path: Path, capfd
) -> None:
    config = tmp_path / 'tiny.py'
    config.write_text(
        "custom_imports = dict(imports=['pm_seg'])\n"
        "default_scope = 'mmseg'\n"
        "model = dict(type='EncoderDecoder',\n"
        "    backbone=dict(type='PMVisionTransformer', img_size=64,\n"
        '        embed_dims=24, num_layers=3, num_heads=3,\n'
        '        compression=dict(keep=0.5)),\n'
        "    decode_head=dict(type='PMSegmenterMaskTransformerHead',\n"
        '        in_channels=24, channels=24, num_classes=5, num_layers=2,\n'
        '        num_heads=3, embed_dims=24))\n'
    )
    torch.save(build().state_dict(), tmp_path / 'pm.pth')
    main(
        [str(config), str(tmp_path / 'pm.pth'), '--logits', 'patches', '--out',
         str(tmp_path / 'pm.onnx'), '--size', '80', '64']
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert '(1, 3, 80, 64) -> logits' in out
    assert 'onnxruntime differs from PyTorch by at most' in out
    assert 'constant folding' not in out + err
    assert (tmp_path / 'pm.onnx').stat().st_size > 100_000


def test_help() -> None:
    text = run_tool('tools/export_onnx.py', '--help').stdout
    assert 'onnxruntime' in text and '--tolerance' in text


def test_old_torch_is_named(monkeypatch) -> None:
    """Torch 2.4 has another ``torch.onnx.export``."""
    monkeypatch.setattr(torch.onnx, 'export', lambda model, args, f: None)
    with pytest.raises(SystemExit, match=r'came with torch 2\.5'):
        check_exporter()
