"""Pictures."""

from __future__ import annotations

import cv2
import numpy as np

from pm_seg.visualization import draw_groups, paint_labels, save_panels


def test_groups_are_flat_outlined_and_pruned_ones_dark() -> None:
    image = np.full((32, 32, 3), 100, np.uint8)
    image[:, 16:] = 200
    group = np.array([[0, 1], [0, -1]])
    out = draw_groups(image, group)
    assert (out[2:14, 2:14] == 100).all()
    assert (out[2:14, 20:30] == 200).all()
    assert (out[20:30, 20:30] == 60).all()
    assert (out[2:14, 16] == 255).all(), 'border between groups'


def test_labels_and_panels(tmp_path) -> None:
    labels = np.array([[0, 1], [255, 1]])
    out = paint_labels(labels, [[1, 2, 3], [4, 5, 6]])
    assert out[0, 0].tolist() == [1, 2, 3] and out[1, 0].tolist() == [0, 0, 0]
    path = tmp_path / 'panels.png'
    save_panels(path, [[out, out], [out, out]], ['left', 'right'])
    assert cv2.imread(str(path)).shape[1] > 200
