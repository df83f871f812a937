"""A project of somebody else: its folder, config, dataset and checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path

import mmseg
import pytest
import torch
from helpers import ROOT, run_tool
from howto import write_files
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

PAGE = 'docs/howto/compress_my_model.md'


@pytest.fixture
def project(tmp_path: Path, scenes: Path) -> Path:
    """The files of the how-to, and a checkpoint that mmseg alone made."""
    assert len(write_files(PAGE, tmp_path)) == 3
    data = tmp_path / 'work_dirs/demo/data'
    data.parent.mkdir(parents=True)
    data.symlink_to(scenes)
    folder = tmp_path / 'my_project'
    config = (folder / 'my_vit.py').read_text()
    assert 'pm_seg' not in config and 'PM' not in config
    init_default_scope('mmseg')
    cfg = Config.fromfile(folder / 'my_vit.py', import_custom_modules=False)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    checkpoint = folder / 'work_dirs/my_vit/iter_300.pth'
    checkpoint.parent.mkdir(parents=True)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    return folder


def run(project: Path, *arguments: str | Path, fresh: bool = False) -> str:
    """Run a tool in the project, which is on Python's path."""
    path = f'{project}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'
    out = run_tool(
        *arguments, cwd=project, env=dict(PYTHONPATH=path), fresh=fresh
    )
    return out.stdout


def test_one_changed_type_and_a_compression_dict(project: Path) -> None:
    """The dense checkpoint runs compressed; then it is fine-tuned."""
    checkpoint = 'work_dirs/my_vit/iter_300.pth'
    out = run(project, ROOT / 'tools/test.py', 'my_pm_vit.py', checkpoint)
    assert re.search(r'mIoU: \d', out)
    out = run(
        project, ROOT / 'tools/train.py', 'my_pm_vit.py', '--cfg-options',
        'train_cfg.max_iters=2', 'train_cfg.val_interval=2',
        'train_dataloader.batch_size=2', 'default_hooks.logger.interval=1',
    )  # fmt: skip
    assert 'Importance of tokens [8/8]' in out
    assert re.search(r'Iter\(train\) \[2/2\].*loss: \d', out)
    assert re.search(r'Iter\(val\).*mIoU: \d', out)
    saved = project / 'work_dirs/my_pm_vit/iter_2.pth'
    state = torch.load(saved, weights_only=False)['state_dict']
    shares = state['backbone.compressor.shares']
    assert shares[0] == 1_000_000 > shares[-1]
    assert state['backbone.compressor.comparison.importance'].any()


@pytest.mark.slow
def test_commands_of_mmseg_itself(project: Path) -> None:
    """What ``mim train mmseg`` runs: the tools inside mmseg."""
    tools = Path(mmseg.__file__).parent / '.mim/tools'
    assert (tools / 'train.py').is_file()
    with (project / 'my_pm_vit.py').open('a') as config:
        config.write("custom_hooks = [dict(type='PruneMergeHook')]\n")
    out = run(
        project, tools / 'train.py', 'my_pm_vit.py', '--cfg-options',
        'train_cfg.max_iters=2', 'train_cfg.val_interval=2', fresh=True,
    )  # fmt: skip
    assert 'Token compression' in out
    out = run(
        project, tools / 'test.py', 'my_pm_vit.py',
        'work_dirs/my_pm_vit/iter_2.pth', fresh=True,
    )  # fmt: skip
    assert re.search(r'mIoU: \d', out)
