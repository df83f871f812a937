"""The Python blocks and the longer commands of the how-tos."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, dense_checkpoint, small_config
from howto import commands, run_line, shell_environment, write_files
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from pm_seg.engine.scoring import require_compressible

HOWTO = 'docs/howto'


def block(page: str, start: str) -> str:
    """The Python block of a page that starts so."""
    text = (ROOT / HOWTO / page).read_text()
    (found,) = [
        part
        for part in re.findall(r'```python\n(.*?)```', text, re.S)
        if part.startswith(start)
    ]
    return found


def run(source: str) -> dict:
    namespace: dict = {}
    exec(compile(source, 'howto.py', 'exec'), namespace)
    return namespace


def compressed(config: str | Path, checkpoint: Path) -> None:
    """A compressed checkpoint of random weights."""
    cfg = Config.fromfile(config, import_custom_modules=False)
    init_default_scope('mmseg')
    cfg.model.type = 'EncoderDecoder'
    cfg.model.pop('teacher', None)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for module in require_compressible(model).values():
        module.compressor.settle()
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    count = cfg.model.decode_head.num_classes
    meta = dict(
        classes=[f'class {i}' for i in range(count)],
        palette=[[9 * i, 99, 99] for i in range(count)],
    )
    saved = dict(state_dict=model.state_dict(), meta=dict(dataset_meta=meta))
    torch.save(saved, checkpoint)


@pytest.mark.slow
def test_timm(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip('timm')
    monkeypatch.chdir(tmp_path)
    page = 'compress_my_model.md'
    starts = ('import timm', 'pictures', 'torch.save')
    names = run(''.join(block(page, start) for start in starts))
    assert names['logits'].shape == (1, 10)
    assert names['small'].blocks.compressor.calibrated
    x = torch.randn(1, 3, 224, 224)
    again = names['again'].eval()
    assert torch.equal(again(x), names['small'](x))


def test_inference_calls(tmp_path: Path, monkeypatch) -> None:
    write_files(f'{HOWTO}/compress_my_model.md', tmp_path)
    project = tmp_path / 'my_project'
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(project)
    compressed('my_pm_vit.py', project / 'pm.pth')
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3))
    cv2.imwrite('street.jpg', picture.astype(np.uint8))
    names = run(block('compress_my_model.md', 'from mmseg.apis'))
    assert names['result'].pred_sem_seg.data.shape == (1, 90, 120)
    assert len(list((project / 'drawn').rglob('street*'))) >= 1


@pytest.mark.slow
def test_compile(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.chdir(tmp_path)
    config = tmp_path / 'configs/demo/segmenter_pm_scenes.py'
    compressed(config, tmp_path / 'work_dirs/half.pth')
    run(block('deploy.md', 'import torch'))


@pytest.mark.slow
def test_fsdp(tmp_path: Path, scenes: Path) -> None:
    """The config and the commands of the page, on two CPU processes."""
    page = f'{HOWTO}/many_gpus.md'
    for name in ('configs', 'tools', 'pm_seg'):
        (tmp_path / name).symlink_to(ROOT / name)
    write_files(page, tmp_path)
    (tmp_path / 'work_dirs/demo').mkdir(parents=True)
    (tmp_path / 'work_dirs/demo/data').symlink_to(scenes)
    compressed(
        ROOT / 'configs/demo/segmenter_pm_scenes.py',
        tmp_path / 'work_dirs/half.pth',
    )
    lines = [line for line in commands(page) if 'work_dirs/fsdp' in line]
    assert len(lines) == 2
    printed = ''
    for line in lines:
        result = run_line(line, tmp_path)
        printed += result.stdout + result.stderr
    assert printed.count('Fine-tuning, compressed: 4/4') == 1
    assert 'System environment' not in printed
    assert re.search(r'mIoU: +\d', result.stdout)


def script(path: Path, body: str) -> None:
    path.write_text(f'#!/bin/bash\n{body}\n')
    path.chmod(0o755)


def test_slurm_starts_as_asked(tmp_path: Path) -> None:
    """The command of the page, with an srun that prints its arguments."""
    (line,) = [c for c in commands(f'{HOWTO}/many_gpus.md') if 'slurm' in c]
    script(tmp_path / 'srun', 'printf "%s " "$@"')
    path = f'{tmp_path}:{shell_environment()["PATH"]}'
    result = run_line(line, ROOT, PATH=path)
    for part in (
        '-p PARTITION --job-name=JOB_NAME',
        '--gres=gpu:8 --ntasks=16 --ntasks-per-node=8',
        'python -u tools/train.py CONFIG --launcher slurm',
    ):
        assert part in result.stdout


# What Slurm does, for two tasks on this machine.
SRUN = """
while [ "$1" != python ]; do shift; done
export SLURM_NTASKS=2 SLURM_JOB_NODELIST='here[1-2]'
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
done
wait %1 && wait %2
"""
SCONTROL = '[ "$*" = "show hostnames here[1-2]" ] && printf "localhost\\nb\\n"'


# A scheduler that ends the second of two processes.
STOP = """
import os, signal
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

@HOOKS.register_module()
class Stop(Hook):
    priority = 'LOW'

    def after_train_iter(self, runner, **kwargs):
        if runner.rank == 1 and runner.iter == 0:
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.slow
def test_slurm_processes_stop_and_go_on(tmp_path: Path, scenes: Path) -> None:
    """The script, with an srun that starts two tasks."""
    script(tmp_path / 'srun', SRUN)
    script(tmp_path / 'scontrol', SCONTROL)
    (tmp_path / 'stop.py').write_text(STOP)
    cfg = small_config(scenes, tmp_path / 'work', iters=2)
    cfg.custom_imports.imports = ['pm_seg', 'stop']
    cfg.custom_hooks += [
        dict(type='Stop'),
        dict(type='InterruptHook', interval=1),
    ]
    cfg.load_from = dense_checkpoint(cfg, tmp_path)
    cfg.dump(tmp_path / 'config.py')
    environment = shell_environment()
    printed = []
    for end in (' || [ $? = 143 ]', ' --resume'):
        line = f'GPUS=2 {ROOT}/tools/slurm_train.sh debug tiny config.py{end}'
        result = run_line(
            line,
            tmp_path,
            PATH=f'{tmp_path}:{environment["PATH"]}',
            PYTHONPATH=str(tmp_path),
            MASTER_PORT=environment['PORT'],
        )
        printed.append(result.stdout + result.stderr)
    saved = f'Last good checkpoint: {tmp_path / "work/iter_1.pth"}'
    assert printed[0].count(saved) == 2
    assert printed[0].count('Go on with the same command and --resume') == 1
    assert printed[1].count('Iter(train) [2/2]') == 1  # of one run, not two
    assert re.search(r'mIoU: +\d', printed[1])


DINOV3 = f'{HOWTO}/compress_my_dinov3_segmenter.md'


@pytest.fixture(scope='module')
def dinov3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands of a page print, on two layers and iterations."""
    pytest.importorskip('timm')
    folder, printed = tmp_path_factory.mktemp('dinov3'), {}
    for name in ('configs', 'tools', 'pm_seg'):
        (folder / name).symlink_to(ROOT / name)
    for line in commands(DINOV3):
        line = line.replace('iter_20.', 'iter_2.').replace('=20', '=2')
        if 'make_scenes' in line:
            line = re.sub(r'--num-train \d+ --num-val \d+', '', line)
            line += ' --num-train 8 --num-val 2'
        else:
            line += '' if '--cfg-options' in line else ' --cfg-options'
            # keep=0.5 of two layers is out of reach.
            line += (
                ' model.backbone.model_args.depth=2'
                ' model.backbone.model_args.embed_dim=48'
                ' model.backbone.model_args.num_heads=3'
                ' model.decode_head.in_channels=48'
                ' model.decode_head.channels=48'
                ' train_dataloader.num_workers=0'
                ' train_dataloader.persistent_workers=False'
            )
            if '_pm_' in line:
                line += ' model.backbone.compression.keep=0.7'
        if 'benchmark' in line:
            line = line.replace('--methods', '--rounds 2 --methods')
        result = run_line(line, folder)
        tool = re.search(r'tools/(\w+)', line)[1]
        printed[tool] = printed.get(tool, '') + result.stdout + result.stderr
    printed['folder'] = str(folder)
    return printed


@pytest.mark.slow
def test_the_tools_on_a_model_of_timm(dinov3: dict[str, str]) -> None:
    """train, compress, test, visualize, benchmark and export, as written."""
    assert re.search(r'mIoU: +\d', dinov3['test'])
    assert '1024 patch tokens (32x32)' in dinov3['compress']
    assert 'Calibrating' not in dinov3['test']
    assert re.search(r'dense .*\n.*ours ', dinov3['benchmark'])
    assert (
        'onnxruntime differs from PyTorch by at most'
        in (dinov3['export_onnx'])
    )
    folder = Path(dinov3['folder']) / 'work_dirs'
    assert len(list((folder / 'dinov3_pictures').rglob('*.png'))) >= 2
    assert (folder / 'linear_dinov3-s_pm_ade20k/iter_2.pth').is_file()


def test_the_dinov3_page_without_configs(monkeypatch) -> None:
    timm = pytest.importorskip('timm')
    create = timm.create_model
    monkeypatch.setattr(
        timm,
        'create_model',
        lambda name, **options: create(
            name, embed_dim=48, num_heads=3, **options
        ),
    )
    names = run(block('compress_my_dinov3_segmenter.md', 'import timm'))
    assert [m.shape for m in names['maps']] == [(1, 48, 16, 16)] * 4
    assert names['last'].shape == (1, 16 * 16 + 5, 48)
