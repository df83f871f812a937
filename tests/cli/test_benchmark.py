"""The benchmark script."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import needs_exporter

from pm_seg.cli import benchmark

CONFIG = 'configs/demo/segmenter_pm_scenes.py'


def run(tmp_path: Path, *options: str) -> list[dict]:
    out, plot = tmp_path / 'a' / 'speed.json', tmp_path / 'b' / 'speed.png'
    rows = benchmark.main(
        [CONFIG, '--rounds', '3', '--out', str(out), '--plot', str(plot),
         *options]
    )  # fmt: skip
    assert json.loads(out.read_text()) == rows
    assert cv2.imread(str(plot)) is not None
    return rows


@needs_exporter
def test_all_methods_at_the_same_share(tmp_path: Path, capsys) -> None:
    rows = run(tmp_path, '--modes', 'eager', 'onnx', '--batch-size', '2')
    assert len(rows) == 6 * 2
    for row in rows:
        dense = row['method'] == 'dense'
        share = row['gmacs'] / rows[0]['gmacs']
        assert share == 1 if dense else 0.4 < share <= 0.5
        assert row['speedup'] == 1 if dense else row['speedup'] > 0
        assert row['of_ideal'] == pytest.approx(row['speedup'] * share)
        rate = row['batch_size'] / row['latency_ms'] * 1e3
        assert row['images_per_s'] == pytest.approx(rate)
    text = capsys.readouterr().out
    assert 'inference, onnx, fp32, batch 2 of 256x256' in text
    assert max(map(len, text.splitlines())) <= 80


def test_training_steps_and_real_images(tmp_path: Path) -> None:
    folder = tmp_path / 'images'
    folder.mkdir()
    cv2.imwrite(str(folder / 'a.png'), np.zeros((40, 50, 3), np.uint8))
    rows = run(
        tmp_path, '--train', '--methods', 'ours', '--dtype', 'bf16',
        '--images', str(folder), '--size', '64', '96',
        '--batch-size', '1', '3',
    )  # fmt: skip
    assert [row['method'] for row in rows] == ['dense', 'ours'] * 2
    assert [row['batch_size'] for row in rows] == [1, 1, 3, 3]
    assert rows[0]['train'] and rows[0]['size'] == [64, 96]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--images', '/nonexistent'], 'no images in this folder'),
        (['--cfg-options', 'model.backbone.compression=None'],
         'the config has no compression'),
    ],
)  # fmt: skip
def test_errors(options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        benchmark.main([CONFIG, *options])


def test_wrong_usage(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        benchmark.main([CONFIG, '--modes', 'onnx', '--train'])
    assert error.value.code == 2
    assert 'onnx times inference' in capsys.readouterr().err
