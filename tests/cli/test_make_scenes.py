"""The scene generator."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from make_scenes import CLASS_IDS, SIZES, draw_scene, write_scenes
from mmengine.registry import init_default_scope
from mmseg.datasets import ADE20KDataset


def test_class_numbers_are_those_of_ade20k() -> None:
    names = ADE20KDataset.METAINFO['classes']
    assert all(names[i - 1] == name for name, i in CLASS_IDS.items())


def test_deterministic_and_varied() -> None:
    image, label = draw_scene(3)
    again = draw_scene(3)
    assert np.array_equal(image, again[0]) and np.array_equal(label, again[1])
    scenes = [draw_scene(seed) for seed in range(40)]
    assert {label.shape for _, label in scenes} == set(SIZES)
    seen = set(np.unique(np.concatenate([s[1].ravel() for s in scenes])))
    assert seen == {0, *CLASS_IDS.values()}
    for image, label in scenes:
        assert image.dtype == label.dtype == np.uint8
        assert image.shape == (*label.shape, 3)


def test_position_bias_and_thin_structures() -> None:
    labels = [draw_scene(seed)[1] for seed in range(40)]
    sky = [np.nonzero(x == CLASS_IDS['sky'])[0] / x.shape[0] for x in labels]
    road = [np.nonzero(x == CLASS_IDS['road'])[0] / x.shape[0] for x in labels]
    assert np.concatenate(sky).mean() < 0.35 < 0.65
    assert np.concatenate(road).mean() > 0.65
    widths = [
        (x == CLASS_IDS['pole']).sum(1).max() / x.shape[1] for x in labels
    ]
    assert 0 < max(widths) < 0.06


def test_layout_is_read_by_ade20k_dataset(scenes: Path) -> None:
    init_default_scope('mmseg')
    dataset = ADE20KDataset(
        data_root=str(scenes),
        data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'
        ),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
        ],
    )
    assert len(dataset) == 12
    item = dataset[0]
    assert item['gt_seg_map'].shape == item['img'].shape[:2]
    path = Path(item['seg_map_path'])
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    void = item['gt_seg_map'] == 255
    assert np.array_equal(item['gt_seg_map'][~void] + 1, stored[~void])


def test_progress_is_reported(tmp_path: Path) -> None:
    steps = list(write_scenes(tmp_path, num_train=2, num_val=1))
    assert steps == [(1, 3), (2, 3), (3, 3)]
