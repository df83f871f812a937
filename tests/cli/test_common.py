"""Configs found from anywhere, early and clear messages."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from mmengine.config import Config

from pm_seg.cli.common import (
    check_checkpoints,
    check_data,
    fetch_checkpoint,
    load_config,
    resolve_config,
)

WEIGHTS = dict(weight=torch.ones(2))
ADE = 'configs/segmenter_vit-s_pm_ade20k.py'


def arguments(config: str, **options) -> Namespace:
    return Namespace(
        config=config, cfg_options=options or None, work_dir=None,
        launcher='none', local_rank=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    'name', [ADE, f'./{ADE}', ADE[:-3], 'segmenter_vit-s_pm_ade20k.py']
)
def test_configs_are_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_config(name)) == ROOT / ADE
    cfg = load_config(arguments(name))
    assert cfg.work_dir == 'work_dirs/segmenter_vit-s_pm_ade20k'


def test_unknown_config_lists_the_known_ones() -> None:
    with pytest.raises(SystemExit, match='segmenter_vit-t_pm_camvid.py'):
        resolve_config('configs/nothing.py')


def test_data_root_reaches_all_loaders() -> None:
    cfg = load_config(arguments(ADE, data_root='elsewhere'))
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == 'elsewhere'
    assert cfg.train_dataloader.dataset.data_prefix.img_path


def test_missing_dataset(tmp_path: Path, scenes: Path) -> None:
    cfg = load_config(arguments(ADE, data_root=str(tmp_path)))
    with pytest.raises(SystemExit) as error:
        check_data(cfg, 'train')
    message = str(error.value)
    assert f'{tmp_path}/images/training does not exist' in message
    assert 'ADEChallengeData2016.zip' in message
    assert 'data_root=/path/to/it' in message
    (tmp_path / 'images/training').mkdir(parents=True)
    with pytest.raises(SystemExit, match='images/training is empty'):
        check_data(cfg, 'train')
    cfg = load_config(arguments(ADE, data_root=str(scenes)))
    check_data(cfg, 'train', 'val', 'test')


def test_missing_dataset_inside_a_wrapper() -> None:
    cfg = load_config(arguments(ADE))
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=inner
    )
    with pytest.raises(SystemExit, match='ADE20KDataset'):
        check_data(cfg, 'train')


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
    monkeypatch.setenv('LOCAL_RANK', '1')
    file = tmp_path / 'torch/hub/checkpoints/vit.pth'
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(WEIGHTS, file)  # the first process is done

    monkeypatch.setattr('time.sleep', sleep)
    path = fetch_checkpoint('http://127.0.0.1:9/models/vit.pth')
    assert Path(path) == file and len(waited) == 1


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
