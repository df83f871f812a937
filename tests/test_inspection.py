"""One image, dense and compressed."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from tiny import batch, build

from pm_seg.engine import Measuring, compress
from pm_seg.visualization.figures import to_array
from pm_seg.visualization.inspection import (
    class_names,
    dataset_meta,
    inspect,
    require_structure,
)
from pm_seg.visualization.inspection import (
    test_pipeline as pipeline_of,
)
from pm_seg.visualization.layers import structure_figures
from pm_seg.visualization.panels import JUDGED


def compressed(**options):
    model = build(**options).eval()
    for parameter in model.parameters():  # as large as trained ones
        if parameter.dim() > 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.test_cfg = ConfigDict(mode='whole')
    compress(model, [batch(0, 2)], measuring=Measuring(1, 0))
    return model


def sample(height: int = 64, width: int = 64, **meta) -> dict:
    """What a test pipeline gives; annotated."""
    image = torch.randint(0, 255, (3, height, width)).byte()
    label = PixelData(data=torch.randint(0, 5, (1, height, width)))
    annotated = SegDataSample(
        gt_sem_seg=label,
        metainfo=dict(
            ori_shape=(height, width), img_shape=(height, width), **meta
        ),
    )
    return dict(inputs=image, data_samples=annotated)


@pytest.mark.parametrize(
    'options', [{}, dict(type='paper'), dict(type='tome', keep=0.7)]
)
def test_both_predictions_and_all_groups(options: dict) -> None:
    model, data = compressed(**options), sample()
    one = inspect(model, data)
    assert set(one.groups) == {'backbone'}
    assert [g.max() + 1 for g in one.groups['backbone']] == [
        load.kept for load in model.backbone.compressor.loads()
    ]
    assert [g.shape for g in one.groups['backbone']] == [(4, 4)] * 3
    assert one.image.shape == (64, 64, 3) and one.patch == 16
    # RGB of what the pipeline left in the order of OpenCV.
    expected = data['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
    assert np.array_equal(one.image, expected)
    assert one.dense.shape == one.compressed.shape == (64, 64)
    assert not one.classifies and one.truth.shape == (64, 64)
    result = model.test_step(
        dict(inputs=[data['inputs']], data_samples=[data['data_samples']])
    )
    found = result[0].pred_sem_seg.data[0].numpy()
    assert np.array_equal(one.compressed, found)
    if not options:
        plain = build(compression=False).eval()
        plain.test_cfg = model.test_cfg
        state = {
            k: v
            for k, v in model.state_dict().items()
            if '.compressor.' not in k
        }
        plain.load_state_dict(state)
        other = inspect(model, data, plain)
        assert np.array_equal(other.dense, one.dense)
        assert not np.array_equal(one.dense, one.compressed)
    figures = one.figures({})
    assert set(figures) == {'groups', 'prediction'}
    assert to_array(figures['prediction']).std() > 10


def test_slide_inference_shows_the_middle_crop() -> None:
    model, data = compressed(), sample(96, 128)
    model.test_cfg.update(mode='slide', crop_size=(64, 64), stride=(32, 32))
    one = inspect(model, data)
    whole = data['inputs'].permute(1, 2, 0).numpy()[..., ::-1]
    assert np.array_equal(one.image, whole[16:80, 32:96])
    assert one.groups['backbone'][0].shape == (4, 4)
    assert one.dense.shape == (96, 128) and one.original.shape[:2] == (96, 128)


def test_the_original_is_drawn_below_predictions_of_its_size(tmp_path):
    path = tmp_path / 'street.png'
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    cv2.imwrite(str(path), picture)
    data = sample(64, 64, img_path=str(path))
    data['data_samples'].set_metainfo(dict(ori_shape=(50, 70)))
    one = inspect(compressed(), data)
    assert one.name == 'street' and one.dense.shape == (50, 70)
    assert np.array_equal(one.original, picture[..., ::-1])
    assert one.truth is None, 'the annotation has another size'
    names = [panel.title for panel in one.prediction_panels({})]
    assert names[:3] == ['image', 'dense', 'compressed']


def test_legends_name_classes_and_changes() -> None:
    annotated = sample()
    annotated['data_samples'].gt_sem_seg.data[0, 0] = 255
    one = inspect(compressed(), annotated)
    meta = dict(
        classes=['sky', 'road', 'tree', 'car', 'sign'],
        palette=[[0, 0, i * 50] for i in range(5)],
    )
    legend = one.legend(meta)
    seen = set(np.unique([one.dense, one.compressed, one.truth])) - {255}
    assert set(legend) == {meta['classes'][i] for i in seen}
    assert one.changes == JUDGED
    assert class_names(dict(classes=['tench, Tinca tinca']), 2) == [
        'tench',
        'class 1',
    ]


def test_names_of_a_dataset() -> None:
    init_default_scope('mmseg')
    by_class = Config(
        dict(test_dataloader=dict(dataset=dict(type='CityscapesDataset')))
    )
    assert dataset_meta(by_class)['classes'][0] == 'road'
    own = dict(type='BaseSegDataset', metainfo=dict(classes=('a', 'b')))
    wrapped = dict(type='RepeatDataset', dataset=own, times=2)
    cfg = Config(dict(train_dataloader=dict(dataset=wrapped)))
    assert dataset_meta(cfg)['classes'] == ('a', 'b')
    saved = dict(meta=dict(dataset_meta=dict(classes=('x',))))
    assert dataset_meta(cfg, saved)['classes'] == ('x',)
    assert dataset_meta(Config(dict())) == {}
    with pytest.raises(ValueError, match='test_dataloader'):
        pipeline_of(cfg)


def test_what_needs_scores_has_no_structure_before() -> None:
    with pytest.raises(ValueError, match='compress.py'):
        require_structure(build(type='paper'))
    with pytest.raises(ValueError, match='nothing to compress'):
        require_structure(build(compression=False))
    require_structure(build())


def test_structure_figures() -> None:
    paper = compressed(type='paper')
    assert set(structure_figures(paper)) == {'tokens', 'scores'}
    assert set(structure_figures(compressed())) == {'tokens'}
