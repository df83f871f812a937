"""The report of a GPU: stopped and gone on, tables, what is carried there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import gpu_report
import gpu_rows
import gpu_tables
import numpy as np
import pytest
import torch
from helpers import ROOT


def rows_of(folder: Path) -> list[dict]:
    lines = (folder / 'rows.jsonl').read_text().splitlines()
    return [json.loads(line) for line in lines]


def run_with(monkeypatch, folder: Path, *functions, minutes: float = 1):
    def tasks(args):
        for number, function in enumerate(functions):
            fields = dict(kind='check', row=f'{number} 50%')
            yield str(number), fields, function

    monkeypatch.setattr(gpu_report, 'tasks', tasks)
    gpu_report.main(
        ['--only', 'checks', '--device', 'cpu', '--out', str(folder),
         '--minutes', str(minutes)]
    )  # fmt: skip
    return rows_of(folder)


def checked() -> dict:
    values = dict(error=1e-6, same=1.0, bf16_error=0.01, bf16_same=0.97)
    return dict(values, ok=True)


def broken() -> dict:
    raise SystemExit('broken')


def never() -> dict:
    raise AssertionError('made twice')


def test_what_failed_or_was_cut_off_is_made_again(
    tmp_path: Path, monkeypatch
) -> None:
    rows = run_with(monkeypatch, tmp_path, checked, broken, checked)
    assert [row['key'] for row in rows] == ['0', '1', '2']
    assert 'broken' in rows[1]['error_text']
    assert 'broken' in (tmp_path / 'report.md').read_text()
    file = tmp_path / 'rows.jsonl'
    file.write_text(file.read_text()[:-20])  # killed while writing
    rows = run_with(monkeypatch, tmp_path, never, checked, checked)
    assert [row['key'] for row in rows] == ['0', '1', '2']
    assert not any('error_text' in row for row in rows)


@pytest.mark.filterwarnings('ignore:Exception ignored')
def test_it_stops_when_the_time_is_over(tmp_path: Path, monkeypatch) -> None:
    def slow() -> dict:
        try:
            time.sleep(60)
        except Exception:
            pytest.fail('swallowed')
        return {}

    rows = run_with(monkeypatch, tmp_path, checked, slow, minutes=0.01)
    assert len(rows) == 1 and (tmp_path / 'report.md').is_file()
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_every_planned_row_is_known() -> None:
    args = gpu_report.parse_args(['--device', 'cpu'])
    plan = list(gpu_report.tasks(args))
    kinds = [fields['kind'] for _, fields, _ in plan]
    first = [kinds.index(kind) for kind in ('check', 'speed', 'accuracy')]
    assert first == sorted(first)
    asked = set()
    for _, fields, _ in plan:
        if fields['kind'] == 'accuracy':
            assert fields['row'] in gpu_rows.camvid_table.ROWS
        if fields['kind'] == 'speed':
            assert fields['setting'] in gpu_rows.SETTINGS
            asked.add((fields['setting'], fields['mode'], fields['row']))
    assert set(gpu_tables.SPEED_TARGETS) <= asked
    assert {'dense', *gpu_tables.ACCURACY_TARGETS} <= {
        fields['row'] for _, fields, _ in plan if fields['kind'] == 'accuracy'
    }


def test_tables_and_picture(tmp_path: Path) -> None:
    where = dict(device='GPU', torch='2.11.0', key='k', train=False)
    speed = dict(where, kind='speed', peak_gib=1.0, mode='eager')
    setting = 'Seg-S 512, batch 32'
    rows = []
    for name, ms, macs in (('dense', 10.0, 40.0), ('ours 50%', 5.0, 20.0)):
        for what in (setting, gpu_tables.PICTURED):
            rows.append(
                dict(speed, setting=what, row=name, latency_ms=ms,
                     gmacs=macs, images_per_s=1000 / ms)
            )  # fmt: skip
        for seed in (0, 1):
            rows.append(
                dict(where, kind='accuracy', row=name, seed=seed,
                     val_miou=60.0 + seed, test_miou=macs + seed)
            )  # fmt: skip
    rows.append(dict(where, kind='cifar', row='dense', top1=95.0))
    text = gpu_tables.report(rows)
    assert (
        '| ours 50%, Seg-S 512, batch 32, eager | 1.75x | 2.00x | reached'
        in text
    )
    assert '| ours 50%, CamVid test | 0.2 | 20.00 | **missed** |' in text
    assert 'not measured' in text
    assert (
        f'| {setting}, eager | ours 50% | 20.0 | 200 | 2.00x | 100% |' in text
    )
    assert '| ours 50% | 60.50 | 20.50 | 2 |' in text
    gpu_tables.plot(rows, tmp_path / 'a.png')
    assert cv2.imread(str(tmp_path / 'a.png')) is not None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / 'data'
    (folder / 'camvid' / 'images').mkdir(parents=True)
    (folder / 'camvid' / 'images' / 'a.jpg').write_bytes(b'image')
    for split in ('train', 'test'):
        for name in ('cat', 'dog'):
            path = folder / 'cifar10' / split / name / '0.png'
            path.parent.mkdir(parents=True)
            cv2.imwrite(str(path), np.zeros((4, 4, 3), np.uint8))
    for name in ('vit-tiny_in1k', 'segmenter_vit-t_camvid'):
        state = dict(state_dict=dict(w=torch.rand(9), n=torch.tensor(3)))
        torch.save(state, folder / f'{name}.pth')
    return folder


def test_a_pack_is_all_that_is_needed(data: Path, monkeypatch) -> None:
    target = data.with_name('packed')
    gpu_report.main(['--pack', str(target), '--data', str(data)])
    saved = torch.load(target / 'vit-tiny_in1k.pth')['state_dict']
    assert saved['w'].dtype == torch.float16 and saved['n'] == 3
    assert (target / 'camvid/images/a.jpg').is_file()
    names = zipfile.ZipFile(target / 'cifar10.zip').namelist()
    assert len(names) == 4 and 'train/cat/0.png' in names
    args = gpu_report.parse_args(['--data', str(target), '--device', 'cpu'])
    gpu_report.check_data(args)
    assert (target / 'cifar10/test/dog/0.png').is_file()
    monkeypatch.setattr(gpu_report, 'MEBIBYTES', 0.0001)
    with pytest.raises(SystemExit, match='larger than 0.0001'):
        gpu_report.main(['--pack', str(target), '--data', str(data)])


def test_missing_data_is_named_before_anything_runs(
    tmp_path: Path, capsys
) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_report.main(['--data', str(tmp_path), '--only', 'accuracy'])
    assert error.value.code == 2
    assert 'camvid is missing; give --data' in capsys.readouterr().err


def test_rows_of_a_tiny_model(tmp_path: Path) -> None:
    args = gpu_report.parse_args(
        ['--tiny', '--device', 'cpu', '--rounds', '2', '--out', str(tmp_path)]
    )
    row = gpu_rows.check_row(args, 'ours 50%')
    assert row['ok'] and row['same'] == 1 and row['error'] == 0
    assert 0 < row['bf16_error'] < 0.1 and row['bf16_same'] > 0.3
    setting = 'DeiT-S 224, batch 256'
    speed = gpu_rows.speed_row(args, setting, 'eager', False, 'ours 60%')
    assert 0.5 < speed['share'] <= 0.6 and speed['gmacs'] > 0
    missing = gpu_rows.speed_row(args, setting, 'eager', False, 'paper 1%')
    assert 'out of reach' in missing['unreachable']


@pytest.mark.slow
def test_killed_and_gone_on(tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / 'tools/gpu_report.py'), '--tiny',
        '--device', 'cpu', '--rounds', '2', '--only', 'checks', 'speed',
        '--out', str(tmp_path),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    file = tmp_path / 'rows.jsonl'
    while not file.exists() or file.read_text().count('\n') < 3:
        time.sleep(0.1)
        assert process.poll() is None
    process.kill()
    process.wait()
    before = [row['key'] for row in rows_of(tmp_path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = rows_of(tmp_path)
    keys = [row['key'] for row in rows]
    assert keys[: len(before)] == before and len(keys) == len(set(keys))
    assert not any('error_text' in row for row in rows)
    text = (tmp_path / 'report.md').read_text()
    assert '| Seg-L 640, batch 8, eager | ours 50% |' in text
