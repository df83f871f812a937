"""The command line tools on classifiers, run as a user would."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT, run_tool

from pm_seg.utils.checkpoints import read_checkpoint

pytest.importorskip('mmpretrain')

DENSE = """
_base_ = '{root}/configs/classification/vit-tiny_cifar10.py'
data_root = '{data}'
train_pipeline = [
    dict(type='SeedAugmentation'), dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64), dict(type='PackInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)),
    dict(type='PackInputs')]
calib_pipeline = test_pipeline
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=24, num_layers=2, num_heads=3,
                  feedforward_channels=48),
        img_size=64, init_cfg=None),
    head=dict(num_classes=3, in_channels=24))
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
tta_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)),
    dict(type='TestTimeAug', transforms=[
        [dict(type='RandomFlip', prob=p) for p in (0.0, 1.0)],
        [dict(type='PackInputs')]])]
"""
PM = """
_base_ = './dense.py'
model = dict(
    type='DistilledImageClassifier', teacher=dict(alpha=0.8, tau=1.0),
    backbone=dict(compression=dict(keep=0.7, first=1)))
load_from = 'work_dirs/dense/epoch_3.pth'
custom_hooks = [
    dict(type='PruneMergeHook', calib_batches=2, evaluate=True),
    dict(type='SeedIterationHook')]
"""
# What a user of mmpretrain has: no pm_seg bases, the preprocessor and the
# data roots where mmpretrain's own configs put them.
STOCK = """
custom_imports = dict(imports=['pm_seg'])
default_scope = 'mmpretrain'
data_preprocessor = dict(mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='PMDistilledVisionTransformer', img_size=64,
        arch=dict(embed_dims=24, num_layers=2, num_heads=3,
                  feedforward_channels=48),
        compression=dict(keep=0.7, first=1)),
    head=dict(
        type='DeiTClsHead', num_classes=3, in_channels=24,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02)))
train_dataloader = dict(
    batch_size=4, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CustomDataset', data_root='nowhere', data_prefix='train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(64, 64)), dict(type='PackInputs')]))
val_dataloader = dict(
    batch_size=4, num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CustomDataset', data_root='nowhere', data_prefix='test',
        pipeline=train_dataloader['dataset']['pipeline']))
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy')
test_evaluator = val_evaluator
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-4))
train_cfg = dict(by_epoch=True, max_epochs=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    visualization=dict(type='VisualizationHook', enable=False))
visualizer = dict(
    type='UniversalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
custom_hooks = [dict(type='PruneMergeHook', calib_batches=2)]
"""


def write_pictures(root: Path) -> None:
    """Three classes that differ in colour, in train and test folders."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('test', 2)):
        for channel, name in enumerate(('blue', 'green', 'red')):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture = rng.integers(0, 120, (48, 56, 3), dtype=np.uint8)
                picture[..., channel] += 100
                cv2.imwrite(str(folder / f'{number}.jpg'), picture)


@pytest.fixture(scope='module')
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: pictures, configs, the checkpoint of a dense run."""
    folder = tmp_path_factory.mktemp('work')
    write_pictures(folder / 'data')
    text = DENSE.format(root=ROOT, data=folder / 'data')
    (folder / 'dense.py').write_text(text)
    (folder / 'pm.py').write_text(PM)
    (folder / 'stock.py').write_text(STOCK)
    run_tool(ROOT / 'tools/train.py', 'dense.py', cwd=folder)
    return folder


def top1(output: str) -> float:
    return float(re.findall(r'accuracy/top1: +([\d.]+)', output)[-1])


def losses(output: str) -> list[str]:
    """Losses of the training log, with epoch and iteration."""
    return re.findall(r'Epoch\(train\) +(\[.*\]).* loss: ([\d.]+)', output)


def test_train_then_test(work: Path) -> None:
    """Score, compress, distil, evaluate and draw."""
    out = run_tool(
        ROOT / 'tools/train.py', 'pm.py', '--cfg-options',
        'default_hooks.logger.interval=1', cwd=work,
    )  # fmt: skip
    for text in (
        'Before compression: accuracy/top1',
        'Importance of tokens [2/2]',
        'Ways to merge',
        'Straight after compression',
        'Distilling from work_dirs/dense/epoch_3.pth',
        'loss_distill',
    ):
        assert text in out.stdout, text
    # The last MLP works on the class token alone.
    assert re.search(r'1 +\d+ +0 +0%', out.stdout)
    (work / 'work_dirs/pm/log.txt').write_text(out.stdout)
    saved = 'work_dirs/pm/epoch_3.pth'
    tested = run_tool(
        ROOT / 'tools/test.py', 'pm.py', saved, '--show-dir', 'drawn',
        '--out', 'predicted.pkl', cwd=work,
    )  # fmt: skip
    assert 0 <= top1(tested.stdout) <= 100
    # Pictures of one name overwrite each other, as in mmpretrain.
    assert {p.name for p in (work / 'drawn').iterdir()} == {
        '0.jpg_0.png', '1.jpg_0.png',
    }  # fmt: skip
    predicted = pickle.loads((work / 'predicted.pkl').read_bytes())
    assert len(predicted) == 6
    tta = run_tool(ROOT / 'tools/test.py', 'pm.py', saved, '--tta', cwd=work)
    assert 0 <= top1(tta.stdout) <= 100
    wrong = run_tool(
        ROOT / 'tools/test.py', 'pm.py', saved, '--out', 'folder', cwd=work,
        check=False,
    )  # fmt: skip
    assert 'ends in .pkl' in wrong.stderr and wrong.returncode == 2


def test_a_resumed_run_follows_the_same_losses(work: Path) -> None:
    options = ['--cfg-options', 'default_hooks.logger.interval=1']
    whole = run_tool(
        ROOT / 'tools/train.py', 'pm.py', *options, '--work-dir', 'whole',
        cwd=work,
    )  # fmt: skip
    (work / 'whole/epoch_3.pth').unlink()
    rest = run_tool(
        ROOT / 'tools/train.py', 'pm.py', *options, '--work-dir', 'whole',
        '--resume', cwd=work,
    )  # fmt: skip
    expected = losses(whole.stdout)
    assert len(expected) == 9
    assert losses(rest.stdout) == expected[6:]


def test_compress_then_test(work: Path) -> None:
    dense = 'work_dirs/dense/epoch_3.pth'
    out = run_tool(
        ROOT / 'tools/compress.py', 'pm.py', dense, '--out', 'pm.pth',
        '--keep', '0.65', cwd=work,
    )  # fmt: skip
    share = float(re.search(r'all .* ([\d.]+)%', out.stdout)[1])
    assert 50 < share <= 65
    target = run_tool(
        ROOT / 'tools/compress.py', 'pm.py', dense, '--out', 'share.pth',
        '--target', 'share=0.9', cwd=work,
    )  # fmt: skip
    share = re.search(r'GMACs \((\d+)%\)', target.stdout)[1]
    assert 70 < int(share) <= 90
    for name in ('pm.pth', 'share.pth'):
        tested = run_tool(ROOT / 'tools/test.py', 'pm.py', name, cwd=work)
        assert 0 <= top1(tested.stdout) <= 100
    tested = run_tool(ROOT / 'tools/test.py', 'pm.py', dense, cwd=work)
    assert 0 <= top1(tested.stdout) <= 100


def test_a_config_in_the_style_of_mmpretrain(work: Path) -> None:
    """DeiT with two tokens; --cfg-options data_root reaches the loaders."""
    options = ['--cfg-options', f'data_root={work}/data']
    failed = run_tool(
        ROOT / 'tools/train.py', 'stock.py', cwd=work, check=False
    )
    assert 'CustomDataset: nowhere/train does not exist' in failed.stderr
    assert 'make_scenes' not in failed.stderr
    run_tool(ROOT / 'tools/train.py', 'stock.py', *options, cwd=work)
    saved = work / 'work_dirs/stock/epoch_1.pth'
    state = read_checkpoint(saved)['state_dict']
    assert state['backbone.compressor.settled']
    run_tool(
        ROOT / 'tools/compress.py', 'stock.py', saved, '--out', 'stock.pth',
        '--keep', '0.65', *options, cwd=work,
    )  # fmt: skip
    tested = run_tool(
        ROOT / 'tools/test.py', 'stock.py', 'stock.pth', *options, cwd=work
    )
    assert 0 <= top1(tested.stdout) <= 100
