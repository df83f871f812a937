"""The command line tools, run as a user would."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cv2
import pytest
import torch
from helpers import (
    ROOT,
    SHARED,
    dense_checkpoint,
    run_tool,
    shared_path,
    small_config,
)

from pm_seg.utils.checkpoints import read_checkpoint

SMALL = """
_base_ = '{root}/configs/demo/segmenter_pm_scenes.py'
crop_size = (64, 64)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=(80, 80)),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(160, 120), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(img_size=crop_size, num_layers=3,
                  compression=dict(keep=0.6)),
    test_cfg=dict(_delete_=True, mode='slide', crop_size=crop_size,
                  stride=(48, 48)),
)
train_dataloader = dict(
    batch_size=2,
    dataset=dict(data_root='{data}', pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(data_root='{data}', pipeline=test_pipeline))
test_dataloader = val_dataloader
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=(80, 80)),
         dict(type='Resize', scale=(64, 64))],
        [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
        [dict(type='LoadAnnotations', reduce_zero_label=True)],
        [dict(type='PackSegInputs')]])]
train_cfg = dict(max_iters=2)
custom_hooks = [dict(type='PruneMergeHook', calib_batches=2)]
"""


@pytest.fixture(scope='module')
def work(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """A user's folder: a config, and the checkpoint of a dense run."""
    folder = tmp_path_factory.mktemp('work')
    (folder / 'pm.py').write_text(SMALL.format(root=ROOT, data=scenes))
    (folder / 'dense.py').write_text(
        "_base_ = './pm.py'\nmodel = dict(backbone=dict(compression=None))\n"
        'custom_hooks = []\n'
    )
    run_tool(ROOT / 'tools/train.py', 'dense.py', cwd=folder)
    return folder


def miou(output: str) -> float:
    return float(re.findall(r'mIoU: +([\d.]+)', output)[-1])


def check_console(result, work_dir: Path | None = None) -> None:
    """No noise at start-up, no colours in a pipe, lines that fit."""
    text = result.stdout + result.stderr
    for noise in ('OneDL', 'Warning', 'WARNING', '\x1b', '0 s left'):
        assert noise not in text, noise
    if work_dir is None:
        return
    for only_in_log in ('System environment', 'Config:', 'Hooks will be'):
        assert only_in_log not in text
        logs = [path.read_text() for path in work_dir.rglob('*.log')]
        assert logs and all(only_in_log in log for log in logs)
    assert 'Config, environment and log: ' in text


def test_compress_then_test_then_train(work: Path, scenes: Path) -> None:
    dense = work / 'work_dirs/dense/iter_2.pth'
    out = run_tool(
        ROOT / 'tools/compress.py', 'pm.py', dense, '--out', 'pm.pth',
        '--keep', '0.5', cwd=work,
    )  # fmt: skip
    assert 'Importance of tokens' in out.stderr
    check_console(out)
    table = [line for line in out.stdout.splitlines() if line[:2] == '  ']
    assert len(table) > 5 and max(map(len, table)) < 80
    share = float(re.search(r'all +[\d.]+ +([\d.]+)%', out.stdout)[1])
    assert 40 < share <= 50
    state = read_checkpoint(work / 'pm.pth')['state_dict']
    assert state['backbone.compressor.shares'].tolist()[0] == 1_000_000
    assert bool(state['backbone.compressor.settled'])
    assert not list(work.glob('*.partial'))

    tested = run_tool(
        ROOT / 'tools/test.py', 'pm.py', 'pm.pth', '--show-dir', 'drawn',
        '--out', 'predicted', cwd=work, fresh=True,
    )  # fmt: skip
    assert 0 <= miou(tested.stdout) <= 100
    check_console(tested, work / 'work_dirs/pm')
    pictures = list((work / 'drawn').rglob('*.png'))
    assert len(pictures) == 3
    for path in (work / 'predicted').glob('*.png'):
        original = scenes / f'annotations/validation/{path.name}'
        assert cv2.imread(str(path)).shape == cv2.imread(str(original)).shape
    assert len(list((work / 'predicted').iterdir())) == 3

    tta = run_tool(
        ROOT / 'tools/test.py', 'pm.py', 'pm.pth', '--tta', cwd=work
    )
    assert 0 <= miou(tta.stdout) <= 100

    trained = run_tool(
        ROOT / 'tools/train.py', 'pm.py', '--cfg-options',
        'load_from=pm.pth', cwd=work,
    )  # fmt: skip
    assert 'keeping its structure' in trained.stdout
    check_console(trained, work / 'work_dirs/pm')
    assert (work / 'work_dirs/pm/iter_2.pth').is_file()


def test_another_budget_takes_the_importance_there_is(work: Path) -> None:
    dense = work / 'work_dirs/dense/iter_2.pth'
    first = run_tool(
        ROOT / 'tools/compress.py', 'pm.py', dense, '--out', 'a.pth', cwd=work
    )
    out = run_tool(
        ROOT / 'tools/compress.py', 'pm.py', 'a.pth', '--out', 'b.pth',
        '--keep', '0.75', cwd=work,
    )  # fmt: skip
    for run, titles in ((first, 2), (out, 1)):
        found = re.findall(r'^([A-Z].*): .*, took \d+ s$', run.stderr, re.M)
        assert found == ['Importance of tokens', 'Ways to merge'][-titles:]
    directions = [
        read_checkpoint(work / name)['state_dict'][
            'backbone.compressor.comparison.importance'
        ]
        for name in ('a.pth', 'b.pth')
    ]
    assert directions[0].any() and directions[0].equal(directions[1])


def test_compressing_without_data_needs_none(work: Path) -> None:
    out = run_tool(
        ROOT / 'tools/compress.py', 'pm.py',
        work / 'work_dirs/dense/iter_2.pth', '--out', 'quick.pth',
        '--calib-batches', '0', '--cfg-options', 'data_root=nowhere',
        cwd=work,
    )  # fmt: skip
    assert 'Wrote quick.pth' in out.stdout and 'Importance' not in out.stderr


def test_train_compresses_and_trains_in_one_command(work: Path) -> None:
    out = run_tool(
        ROOT / 'tools/train.py', 'pm.py', '--work-dir', 'one', '--cfg-options',
        f'load_from={work}/work_dirs/dense/iter_2.pth', cwd=work,
    )  # fmt: skip
    assert 'Importance of tokens [2/2]' in out.stdout
    assert 'Token compression' in out.stdout
    tested = run_tool(
        ROOT / 'tools/test.py', 'pm.py', 'one/iter_2.pth', cwd=work
    )
    assert 0 <= miou(tested.stdout) <= 100


def test_a_dense_checkpoint_runs_compressed(work: Path) -> None:
    dense = work / 'work_dirs/dense/iter_2.pth'
    out = run_tool(ROOT / 'tools/test.py', 'pm.py', dense, cwd=work)
    assert 0 <= miou(out.stdout) <= 100


def test_the_papers_form_says_that_a_dense_checkpoint_has_no_groups(
    work: Path,
) -> None:
    out = run_tool(
        ROOT / 'tools/test.py', 'pm.py',
        work / 'work_dirs/dense/iter_2.pth', '--cfg-options',
        'model.backbone.compression._delete_=True',
        'model.backbone.compression.type=paper', cwd=work, check=False,
    )  # fmt: skip
    assert out.returncode == 1
    assert 'tools/compress.py' in out.stderr
    assert 'Traceback' not in out.stderr


def test_a_compressed_checkpoint_in_a_dense_config_is_one_message(
    work: Path,
) -> None:
    dense = work / 'work_dirs/dense/iter_2.pth'
    run_tool(
        ROOT / 'tools/compress.py', 'pm.py', dense, '--out', 'c.pth',
        '--calib-batches', '0', cwd=work,
    )  # fmt: skip
    out = run_tool(
        ROOT / 'tools/test.py', 'dense.py', 'c.pth', cwd=work, check=False
    )
    assert out.returncode == 1 and 'Traceback' not in out.stderr
    assert 'give its config the compression=dict(...)' in out.stderr


def test_a_wrong_checkpoint_fails_saying_which_key(work: Path) -> None:
    saved = read_checkpoint(work / 'work_dirs/dense/iter_2.pth')
    key = 'backbone.layers.0.ffn.layers.1.weight'
    saved['state_dict'][key] = saved['state_dict'][key][:-1]
    torch.save(dict(state_dict=saved['state_dict']), work / 'wrong.pth')
    out = run_tool(
        ROOT / 'tools/test.py', 'dense.py', 'wrong.pth', cwd=work, check=False
    )
    assert out.returncode == 1 and 'Traceback' not in out.stderr
    assert 'layers.0.ffn.layers.1.weight: shape (191, 768)' in out.stderr
    assert 'Traceback' not in out.stderr


def test_missing_data_and_checkpoint(tmp_path: Path) -> None:
    config = 'configs/segmenter_vit-t_pm_camvid.py'
    out = run_tool(ROOT / 'tools/train.py', config, cwd=tmp_path, check=False)
    assert out.returncode == 1
    assert 'data/camvid/images/train does not exist' in out.stderr
    assert 'Traceback' not in out.stderr
    out = run_tool(
        ROOT / 'tools/test.py', config, 'no.pth', cwd=tmp_path, check=False
    )
    assert out.returncode == 1
    assert 'Checkpoint not found: no.pth' in out.stderr
    assert not list(tmp_path.iterdir())


def test_the_main_ade20k_config_runs_on_scenes(
    scenes: Path, tmp_path: Path
) -> None:
    """Nothing changed but the data root and the number of images seen."""
    options = [
        '--cfg-options', f'data_root={scenes}', 'load_from=None',
        'train_cfg.max_iters=1', 'train_cfg.val_interval=10',
        'custom_hooks.0.calib_batches=1', 'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'train_dataloader.batch_size=1', 'val_dataloader.dataset.indices=1',
        'test_dataloader.dataset.indices=1',
    ]  # fmt: skip
    config = 'configs/segmenter_vit-s_pm_ade20k.py'
    run_tool(ROOT / 'tools/train.py', config, *options, cwd=tmp_path)
    name = tmp_path / 'work_dirs/segmenter_vit-s_pm_ade20k'
    out = run_tool(
        ROOT / 'tools/test.py', config, name / 'iter_1.pth', *options,
        '--show-dir', 'drawn', cwd=tmp_path,
    )  # fmt: skip
    assert 0 <= miou(out.stdout) <= 100
    assert len(list((tmp_path / 'drawn').rglob('*.png'))) == 1


def test_make_scenes(tmp_path: Path) -> None:
    out = run_tool(
        ROOT / 'tools/make_scenes.py', tmp_path, '--num-train', '3',
        '--num-val', '2',
    )  # fmt: skip
    assert 'Wrote 5 scenes' in out.stdout
    assert len(list(tmp_path.rglob('*.png'))) == 5


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    out = run_tool(
        ROOT / 'tools/demo.py', '--quick', '--work-dir', tmp_path / 'demo'
    )
    assert 'compressed, fine-tuned' in out.stdout
    assert f'Report:   {tmp_path}/demo/report.html' in out.stdout
    assert (tmp_path / 'demo/report.html').stat().st_size > 100_000
    assert cv2.imread(str(tmp_path / 'demo/demo.png')) is not None


def test_demo_of_ones_own_model(scenes: Path, tmp_path: Path) -> None:
    """A config of mmseg's own classes, and its checkpoint."""
    cfg = small_config(scenes, tmp_path / 'work')
    cfg.model.backbone.num_layers = 4  # half is in reach
    checkpoint = dense_checkpoint(cfg, tmp_path)
    cfg.model.type = 'EncoderDecoder'
    cfg.model.pop('teacher', None)
    cfg.model.backbone.pop('compression')
    cfg.model.backbone.update(type='VisionTransformer', patch_bias=True)
    cfg.model.decode_head.type = 'SegmenterMaskTransformerHead'
    cfg.custom_hooks = []
    cfg.dump(tmp_path / 'mine.py')
    arguments = [
        ROOT / 'tools/demo.py', '--quick', '--work-dir', tmp_path / 'demo',
        '--config', tmp_path / 'mine.py', '--checkpoint', checkpoint,
    ]  # fmt: skip
    out = run_tool(*arguments)
    assert 'compressed, fine-tuned' in out.stdout
    assert cv2.imread(str(tmp_path / 'demo/demo.png')) is not None
    cfg.model.backbone.type = 'ResNet'
    cfg.dump(tmp_path / 'mine.py')
    out = run_tool(*arguments, check=False)
    assert "backbone of type 'ResNet', expected" in out.stderr
    assert 'Traceback' not in out.stderr


@pytest.mark.slow
@pytest.mark.parametrize('stock', [False, True])
def test_camvid_miou(tmp_path: Path, stock: bool) -> None:
    """mIoU of the given checkpoint on the validation images: 68.63."""
    shared_path('data/camvid')
    options = [f'data_root={SHARED}/data/camvid']
    if stock:
        options += [
            'model.backbone.type=VisionTransformer',
            'model.backbone.patch_bias=True',
            'model.decode_head.type=SegmenterMaskTransformerHead',
        ]
    out = run_tool(
        ROOT / 'tools/test.py', 'configs/segmenter_vit-t_camvid.py',
        shared_path('weights/segmenter_vit-t_camvid.pth'),
        '--cfg-options', *options, cwd=tmp_path,
    )  # fmt: skip
    assert miou(out.stdout) == pytest.approx(68.63, abs=0.02)


@pytest.mark.slow
def test_camvid_compress_train_test(tmp_path: Path) -> None:
    """The main job on real data: keep 0.5, a few iterations, sane mIoU."""
    shared_path('data/camvid')
    (tmp_path / 'checkpoints').mkdir()
    shutil.copy(
        shared_path('weights/segmenter_vit-t_camvid.pth'),
        tmp_path / 'checkpoints',
    )
    config = 'configs/segmenter_vit-t_pm_camvid.py'
    data = f'data_root={SHARED}/data/camvid'
    run_tool(
        ROOT / 'tools/train.py', config, '--cfg-options', data,
        'train_cfg.max_iters=20', 'train_cfg.val_interval=100',
        'param_scheduler.1.end=20', 'param_scheduler.0.end=5',
        'param_scheduler.1.begin=5', cwd=tmp_path,
    )  # fmt: skip
    saved = tmp_path / 'work_dirs/segmenter_vit-t_pm_camvid/iter_20.pth'
    out = run_tool(
        ROOT / 'tools/test.py', config, saved, '--cfg-options', data,
        cwd=tmp_path,
    )  # fmt: skip
    assert 67 < miou(out.stdout) < 70
