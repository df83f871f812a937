"""Checkpoints are made local, or missed early."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from mmengine.config import Config

from pm_seg.cli.checkpoint import check_checkpoints, fetch_checkpoint

WEIGHTS = dict(weight=torch.ones(2))


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match='Checkpoint not found: none.pth'):
        fetch_checkpoint('none.pth')
    file = tmp_path / 'some.pth'
    torch.save(WEIGHTS, file)
    assert fetch_checkpoint(str(file)) == str(file)


def test_download_fails(tmp_path: Path, monkeypatch) -> None:
    """Nothing listens on this port of the own machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    with pytest.raises(SystemExit) as error:
        fetch_checkpoint('http://127.0.0.1:9/models/vit.pth')
    assert 'put it at checkpoints/vit.pth' in str(error.value)
    (tmp_path / 'checkpoints').mkdir()
    torch.save(WEIGHTS, tmp_path / 'checkpoints/vit.pth')
    path = fetch_checkpoint('http://127.0.0.1:9/models/vit.pth')
    assert path == 'checkpoints/vit.pth'


def test_other_processes_wait_for_the_download(
    tmp_path: Path, monkeypatch
) -> None:
    """Every process ends up with the same local path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    file = tmp_path / 'torch/hub/checkpoints/vit.pth'
    file.parent.mkdir(parents=True)
    began = threading.Event()

    def first_process() -> None:
        with FileLock(f'{file}.lock'):
            began.set()
            time.sleep(0.3)
            torch.save(WEIGHTS, file)

    thread = threading.Thread(target=first_process)
    thread.start()
    began.wait()
    path = fetch_checkpoint('http://127.0.0.1:9/models/vit.pth')
    assert Path(path) == file
    thread.join()


def test_all_checkpoints_of_a_config(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'checkpoints').mkdir()
    for name in ('a.pth', 'b.pth', 'c.pth'):
        torch.save(WEIGHTS, tmp_path / 'checkpoints' / name)
    model = dict(
        pretrained='http://127.0.0.1:9/b.pth',
        backbone=dict(init_cfg=dict(checkpoint='http://127.0.0.1:9/c.pth')),
    )
    cfg = Config(dict(load_from=None, model=model))
    check_checkpoints(cfg)
    assert cfg.model.pretrained == 'checkpoints/b.pth'
    assert cfg.model.backbone.init_cfg.checkpoint == 'checkpoints/c.pth'
    cfg = Config(dict(load_from='http://127.0.0.1:9/a.pth', model=model))
    check_checkpoints(cfg)
    assert cfg.load_from == 'checkpoints/a.pth'
    assert cfg.model.pretrained.startswith('http')
