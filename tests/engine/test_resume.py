"""Runs that are killed and resumed end like runs that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT, dense_checkpoint, run_tool, small_config
from mmengine.config import Config

from pm_seg.utils.checkpoints import (
    latest_intact_checkpoint,
    read_checkpoint,
)

ITERS = 6

# Kills its own process: when the KILL_AT-th image is loaded, or halfway
# through writing the checkpoint named KILL_IN. Only once.
KILL = """
import os
import signal
from pathlib import Path
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS
from pm_seg.engine.hooks.checkpoint_hook import WholeFileBackend

FLAG = Path(os.environ.get('KILL_FLAG', '/nonexistent'))
count = 0


def kill():
    FLAG.touch()
    os.kill(os.getpid(), signal.SIGKILL)


@TRANSFORMS.register_module()
class KillAt(BaseTransform):
    def transform(self, results):
        global count
        count += 1
        if count == int(os.environ.get('KILL_AT', -1)) and not FLAG.exists():
            kill()
        return results


put = WholeFileBackend.put


def put_half(self, obj, filepath):
    if filepath.endswith(os.environ.get('KILL_IN', '?')):
        if not FLAG.exists():
            half = Path(f'{filepath}.{os.getpid()}.partial')
            half.write_bytes(obj[:len(obj) // 2])
            kill()
    put(self, obj, filepath)


WholeFileBackend.put = put_half
"""


def write_config(scenes: Path, folder: Path, workers: int) -> None:
    cfg = small_config(scenes, folder / 'work', iters=ITERS)
    cfg.custom_imports.imports = ['pm_seg', 'kill']
    cfg.train_dataloader.dataset.pipeline.insert(1, dict(type='KillAt'))
    cfg.train_dataloader.num_workers = workers
    # everything random is on
    cfg.model.backbone.update(drop_path_rate=0.3, drop_rate=0.1)
    cfg.model.decode_head.dropout_ratio = 0.1
    cfg.model.teacher = dict(alpha=0.5, tau=20.0)
    cfg.custom_hooks += [dict(type='SeedIterationHook')]
    cfg.param_scheduler = [
        dict(
            type='CosineAnnealingLR', eta_min=0.0, begin=0, end=ITERS,
            by_epoch=False,
        )
    ]  # fmt: skip
    cfg.default_hooks.checkpoint.update(interval=2, max_keep_ckpts=2)
    cfg.load_from = str(folder.parent / 'dense.pth')
    cfg.dump(folder / 'config.py')
    (folder / 'kill.py').write_text(KILL)


def train(folder: Path, *arguments: str, check: bool = True, **env: str):
    env = dict(PYTHONPATH=str(folder), **env)
    return run_tool(
        ROOT / 'tools/train.py', 'config.py', *arguments, cwd=folder, env=env,
        check=check,
    )  # fmt: skip


def curve(folder: Path) -> dict[int, float]:
    """Loss of each iteration, the last run's where there are several."""
    losses: dict[int, float] = {}
    for file in sorted((folder / 'work').glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if 'loss' in row:
                losses[row['step']] = row['loss']
    return losses


def final(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / 'work' / f'iter_{ITERS}.pth'
    return read_checkpoint(path)['state_dict']


@pytest.fixture(scope='module')
def uninterrupted(scenes: Path, tmp_path_factory) -> Path:
    """The run to compare with; its images come from two workers."""
    root = tmp_path_factory.mktemp('resume')
    folder = root / 'whole'
    folder.mkdir()
    dense_checkpoint(small_config(scenes, root), root)
    write_config(scenes, folder, workers=2)
    train(folder)
    assert sorted(curve(folder)) == list(range(1, ITERS + 1))
    return folder


def test_killed_and_resumed(scenes: Path, uninterrupted: Path) -> None:
    """While calibrating, fine-tuning and saving, one after the other."""
    folder = uninterrupted.parent / 'killed'
    folder.mkdir()
    write_config(scenes, folder, workers=0)
    work = folder / 'work'
    batches = 2 * 2 + 4 * 2  # images of calibration and four iterations
    for number, (env, starts_at) in enumerate(
        [
            (dict(KILL_AT='3'), None),
            (dict(KILL_AT=str(batches + 1)), 1),
            (dict(KILL_IN=f'iter_{ITERS}.pth'), 5),
            ({}, 5),
        ]
    ):
        flag = folder / f'killed-{number}'
        resume = ['--resume'] if number else []
        out = train(
            folder, *resume, check=not env, KILL_FLAG=str(flag),
            PYTHONUNBUFFERED='1', **env,
        )  # fmt: skip
        assert ('Nothing to resume' in out.stdout) == (number == 1)
        if env:
            assert out.returncode == -9 and flag.exists()
            assert not (work / f'iter_{ITERS}.pth').exists()
        unfinished = list(work.glob('*.partial'))
        assert len(unfinished) == ('KILL_IN' in env)
        runs = sorted(work.glob('*/vis_data/scalars.json'))
        if starts_at is not None:
            lines = runs[-1].read_text().splitlines()
            assert min(json.loads(line)['step'] for line in lines) == starts_at
    expected, actual = final(uninterrupted), final(folder)
    for name in (
        'shares',
        'comparison.importance',
        'comparison.strength',
        'settled',
    ):
        key = f'backbone.compressor.{name}'
        assert torch.equal(actual[key], expected[key]), key
    assert expected['backbone.compressor.settled']
    whole, resumed = curve(uninterrupted), curve(folder)
    assert sorted(resumed) == sorted(whole)
    for step, loss in whole.items():
        assert resumed[step] == pytest.approx(loss, rel=1e-5), step
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=1e-4, atol=1e-5, msg=key
        )


def test_latest_intact_checkpoint(tmp_path: Path, capsys) -> None:
    assert latest_intact_checkpoint(tmp_path) is None
    for step in (2, 10):
        torch.save(dict(step=step), tmp_path / f'iter_{step}.pth')
    torch.save({}, tmp_path / 'best_mIoU_iter_99.pth')
    assert latest_intact_checkpoint(tmp_path).endswith('iter_10.pth')
    broken = tmp_path / 'iter_10.pth'
    broken.write_bytes(broken.read_bytes()[:-20])
    assert latest_intact_checkpoint(tmp_path).endswith('iter_2.pth')
    assert 'Passing over' in capsys.readouterr().err


def test_resuming_keeps_the_teacher(tmp_path: Path, monkeypatch) -> None:
    """--resume loads its own checkpoint; the teacher stays the dense one."""
    from pm_seg.cli.checkpoint import fix_teacher, prepare_resume

    monkeypatch.chdir(tmp_path)
    torch.save(dict(weight=torch.ones(1)), 'dense.pth')
    Path('work').mkdir()
    torch.save({}, 'work/iter_3.pth')
    cfg = Config(
        dict(load_from='dense.pth', work_dir='work', model=dict(teacher={}))
    )
    fix_teacher(cfg)
    prepare_resume(cfg)
    assert cfg.resume and cfg.load_from == 'work/iter_3.pth'
    assert cfg.model.teacher.checkpoint == 'dense.pth'
    cfg = Config(dict(load_from=None, model=dict(teacher=dict(tau=1))))
    fix_teacher(cfg)
    assert cfg.model.teacher is None
