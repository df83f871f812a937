"""Configs are found from anywhere; one data root for all loaders."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from helpers import ROOT

from pm_seg.cli.config import load_config, resolve_config

ADE = 'configs/segmenter_vit-s_pm_ade20k.py'


def arguments(config: str, **options) -> Namespace:
    return Namespace(config=config, cfg_options=options or None)


@pytest.mark.parametrize(
    'name', [ADE, f'./{ADE}', ADE[:-3], 'segmenter_vit-s_pm_ade20k.py']
)
def test_configs_are_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(resolve_config(name)) == ROOT / ADE
    assert load_config(arguments(name)).model.backbone.compression.keep == 0.5


def test_unknown_config_lists_the_known_ones() -> None:
    with pytest.raises(SystemExit, match='segmenter_vit-t_pm_camvid.py'):
        resolve_config('configs/nothing.py')


def test_data_root_reaches_all_loaders() -> None:
    cfg = load_config(arguments(ADE, data_root='elsewhere'))
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == 'elsewhere'
    assert cfg.train_dataloader.dataset.data_prefix.img_path
