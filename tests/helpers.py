"""What tests share: reference data, running tools, small configs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import run_forked
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from paths import ROOT

from pm_seg.cli.export_onnx import has_exporter
from pm_seg.models.distillation import strip_compression

#: Goldens, trained weights and CamVid; tests that need them are skipped
#: where they are missing.
SHARED = Path(os.environ.get('PM_SEG_SHARED', ROOT.parent / 'shared'))

needs_exporter = pytest.mark.skipif(
    not has_exporter(), reason='the exporter to ONNX came with torch 2.5'
)
in_one_graph = pytest.mark.skipif(
    torch.__version__ < (2, 5),
    reason="torch 2.4 breaks the graph at mmcv's FFN and at feature maps",
)


def slow(value: object) -> object:
    """A parameter of tests with which they are slow."""
    return pytest.param(value, marks=pytest.mark.slow)


def shared_path(relative: str) -> Path:
    """A file of the reference data, or skip the test."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f'reference data not found: {path} (set PM_SEG_SHARED)')
    return path


def run_tool(
    *arguments: str | Path,
    cwd: Path | None = None,
    check: bool = True,
    env: dict[str, str] | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a Python script as a user would, in a process of its own.

    Args:
        *arguments (str | Path): The script and its arguments.
        cwd (Path, optional): Defaults to the checkout.
        check (bool): Whether it has to succeed. Defaults to True.
        env (dict, optional): Added to the environment.
        fresh (bool): Whether it imports everything itself, for tests of what
            that prints or does. Defaults to False.
    """
    command, cwd = list(map(str, arguments)), cwd or ROOT
    env = {**os.environ, **(env or {})}
    if fresh:
        result = subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=env,
            capture_output=True,
            text=True,
        )
    else:
        result = run_forked(command, cwd, env)
    if check and result.returncode:
        raise AssertionError(
            f'{arguments} failed:\n{result.stdout[-3000:]}\n'
            f'{result.stderr[-3000:]}'
        )
    return result


def free_port() -> int:
    """For processes of a distributed run to meet."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def small_config(scenes: Path, work_dir: Path, iters: int = 2) -> Config:
    """The demo's compressed model, smaller, on a few scenes."""
    cfg = Config.fromfile(ROOT / 'configs/demo/segmenter_pm_scenes.py')
    cfg.model.backbone.update(img_size=(64, 64), num_layers=2)
    # Layer 0 too: most budgets are in reach of two layers.
    cfg.model.backbone.compression.update(keep=0.6, first=0)
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.model.teacher = None
    for name in ('train', 'val', 'test'):
        loader = cfg[f'{name}_dataloader']
        loader.dataset.data_root = str(scenes)
        for step in loader.dataset.pipeline:
            if step['type'] == 'RandomCrop':
                step['crop_size'] = (64, 64)
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.max_iters = iters
    cfg.custom_hooks = [dict(type='PruneMergeHook', calib_batches=2)]
    cfg.default_hooks.logger.interval = 1
    cfg.work_dir = str(work_dir)
    return cfg


def dense_checkpoint(cfg, folder: Path) -> str:
    """A dense start for runs with a teacher."""
    init_default_scope('mmseg')
    model = MODELS.build(strip_compression(cfg.model.to_dict()))
    model.init_weights()
    path = folder / 'dense.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)
