"""Missing datasets give early and clear messages."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config import ADE, arguments

from pm_seg.cli.config import load_config
from pm_seg.cli.data import check_data


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
