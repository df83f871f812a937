"""Cityscapes and Pascal Context configs on tiny folders of their layout."""

from __future__ import annotations

from pathlib import Path

import cv2
import mmseg
import numpy as np
import pytest
import torch
from helpers import ROOT
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS, MODELS

from pm_seg.cli.data import check_data
from pm_seg.engine.compression import calibration_loader

#: Classes, crop, stride, image size, and the stock dataset file.
DATA = {
    'cityscapes': (19, 768, 512, (1024, 2048), 'cityscapes_768x768.py'),
    'pascal_context': (60, 480, 320, (375, 500), 'pascal_context.py'),
}


def read(data: str, kind: str = '_pm', size: str = 's') -> Config:
    name = f'segmenter_vit-{size}{kind}_{data}.py'
    return Config.fromfile(ROOT / 'configs' / name)


def write_pair(image: Path, label: Path, data: str) -> None:
    """A picture and its classes, with the value for 'ignore' among them."""
    classes, _, _, size, _ = DATA[data]
    rng = np.random.default_rng(0)
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    small = rng.integers(0, 255, (9, 16, 3), np.uint8)
    cv2.imwrite(str(image), cv2.resize(small, size[::-1]))
    blocks = rng.integers(0, classes, (5, 7), np.uint8)
    blocks[0, 0], blocks[4, 6] = classes - 1, 255
    cv2.imwrite(str(label), cv2.resize(blocks, size[::-1], interpolation=0))


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    """Roots of both datasets, with one image for each split."""
    city, voc = tmp_path / 'city', tmp_path / 'VOC2010'
    for split in ('train', 'val'):
        folder = f'{split}/town'
        write_pair(
            city / f'leftImg8bit/{folder}/town_000_1_leftImg8bit.png',
            city / f'gtFine/{folder}/town_000_1_gtFine_labelTrainIds.png',
            'cityscapes',
        )
        write_pair(
            voc / f'JPEGImages/2008_{split}.jpg',
            voc / f'SegmentationClassContext/2008_{split}.png',
            'pascal_context',
        )
        names = voc / f'ImageSets/SegmentationContext/{split}.txt'
        names.parent.mkdir(parents=True, exist_ok=True)
        names.write_text(f'2008_{split}\n')
    return {'cityscapes': city, 'pascal_context': voc}


def with_root(cfg: Config, root: Path) -> Config:
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = str(root)
    return cfg


@pytest.mark.parametrize('data', list(DATA))
def test_a_sample(data: str, roots: dict[str, Path]) -> None:
    classes, crop, _, size, _ = DATA[data]
    cfg = with_root(read(data), roots[data])
    check_data(cfg, 'train', 'val', 'test')
    init_default_scope('mmseg')
    train = DATASETS.build(cfg.train_dataloader.dataset)
    val = DATASETS.build(cfg.val_dataloader.dataset)
    assert len(train) == len(val) == 1
    assert len(train.metainfo['classes']) == classes
    assert cfg.model.decode_head.num_classes == classes
    sample = train[0]
    label = sample['data_samples'].gt_sem_seg.data
    assert sample['inputs'].shape[0] == 3
    assert max(sample['inputs'].shape[1:]) <= crop
    assert set(label.unique().tolist()) <= {*range(classes), 255}
    label = val[0]['data_samples'].gt_sem_seg.data
    assert label.shape == (1, *size), 'annotations keep their size'
    assert label.max() == 255 and classes - 1 in label, 'no class is dropped'
    calib = DATASETS.build(calibration_loader(cfg).dataset)
    assert max(calib[0]['inputs'].shape[1:]) <= crop


@pytest.mark.parametrize('data', list(DATA))
def test_slide_inference(
    data: str, roots: dict[str, Path], monkeypatch
) -> None:
    """One whole test image through a model with fewer channels."""
    classes, crop, stride, size, _ = DATA[data]
    cfg = with_root(read(data), roots[data])
    init_default_scope('mmseg')
    model_cfg = cfg.model
    assert model_cfg.test_cfg == dict(
        mode='slide', crop_size=(crop, crop), stride=(stride, stride)
    )
    model_cfg.update(pretrained=None, type='EncoderDecoder')
    model_cfg.pop('teacher', None)
    slim = dict(num_heads=1, embed_dims=16)
    model_cfg.backbone.update(num_layers=3, **slim)
    model_cfg.decode_head.update(in_channels=16, channels=16, **slim)
    model = MODELS.build(model_cfg).eval()
    compressor = model.backbone.compressor
    assert compressor.shape.grid == (crop // 16, crop // 16)
    seen = []
    forward = model.backbone.forward
    monkeypatch.setattr(
        model.backbone,
        'forward',
        lambda x: seen.append(tuple(x.shape[2:])) or forward(x),
    )
    batch = pseudo_collate([DATASETS.build(cfg.val_dataloader.dataset)[0]])
    with torch.no_grad():
        (result,) = model.val_step(batch)
    assert result.pred_sem_seg.shape == size
    assert result.seg_logits.data.shape == (classes, *size)
    if data == 'cityscapes':  # 2049x1025 in steps of 512
        assert seen == [(768, 768)] * 8
    else:  # 520x390: lower than a crop
        assert seen == [(390, 480)] * 2


@pytest.mark.parametrize('size', 'sl')
@pytest.mark.parametrize('data', list(DATA))
def test_as_in_mmseg(data: str, size: str) -> None:
    """Pipelines, splits and classes of the stock dataset file."""
    folder = Path(mmseg.__path__[0]) / '.mim/configs/_base_/datasets'
    if not (folder / DATA[data][-1]).is_file():
        pytest.skip('this mmseg ships no configs')
    stock = Config.fromfile(folder / DATA[data][-1])
    ours = read(data, size=size)
    for split in ('train', 'val', 'test'):
        a = ours[f'{split}_dataloader'].dataset
        b = stock[f'{split}_dataloader'].dataset
        steps = [s for s in a.pipeline if s.type != 'SeedAugmentation']
        assert steps == b.pipeline
        assert a.type == b.type and a.get('ann_file') == b.get('ann_file')
        for key, folder_name in b.data_prefix.items():
            assert Path(a.data_prefix[key]) == Path(folder_name)
        assert Path(a.data_root) == Path(b.data_root)


@pytest.mark.parametrize('data', list(DATA))
def test_schedules(data: str) -> None:
    for kind, iters in (('', 80000), ('_pm', 10000)):
        for size in 'sl':
            cfg = read(data, kind, size)
            assert cfg.train_cfg.max_iters == iters
            assert cfg.param_scheduler[-1].end == iters
            assert iters % cfg.train_cfg.val_interval == 0
    assert cfg.load_from == f'work_dirs/segmenter_vit-l_{data}/iter_80000.pth'
    assert cfg.custom_hooks[0].type == 'PruneMergeHook'


def test_missing_parts_are_named(roots: dict[str, Path]) -> None:
    cfg = with_root(read('pascal_context'), roots['pascal_context'])
    names = roots['pascal_context'] / 'ImageSets/SegmentationContext/val.txt'
    names.unlink()
    with pytest.raises(SystemExit, match='val.txt does not exist') as error:
        check_data(cfg, 'val')
    assert 'converters/pascal_context.py' in str(error.value)
    cfg = with_root(read('cityscapes'), roots['cityscapes'] / 'nothing')
    with pytest.raises(SystemExit, match='csCreateTrainIdLabelImgs'):
        check_data(cfg, 'train')
