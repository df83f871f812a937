"""The stock inference calls on compressed models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, small_config
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain import ImageClassificationInferencer
from mmseg.apis import MMSegInferencer, inference_model, init_model

from pm_seg.engine import compress


def save_compressed(cfg: Config, classes: tuple, folder: Path) -> list[str]:
    """A config file and a compressed checkpoint of random weights."""
    from mmengine.registry import MODELS

    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    compress(model)
    checkpoint = folder / 'pm.pth'
    palette = [[10 * i, 0, 0] for i in range(len(classes))]
    meta = dict(dataset_meta=dict(classes=classes, palette=palette))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    cfg.dump(folder / 'pm.py')
    return [str(folder / 'pm.py'), str(checkpoint)]


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory, scenes: Path) -> list[str]:
    folder = tmp_path_factory.mktemp('segmentor')
    cfg = small_config(scenes, folder / 'work')
    names = tuple(f'class {i}' for i in range(24))
    return save_compressed(cfg, names, folder)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)


def test_init_model_and_inference_model(segmentor, image) -> None:
    model = init_model(*segmentor, device='cpu')
    assert model.backbone.compressor.compressed
    result = inference_model(model, image)
    assert result.pred_sem_seg.data.shape == (1, 70, 90)
    several = inference_model(model, [image, image[:, ::-1].copy()])
    assert torch.equal(several[0].pred_sem_seg.data, result.pred_sem_seg.data)


def test_mmseg_inferencer(segmentor, image, tmp_path: Path) -> None:
    model = init_model(*segmentor, device='cpu')
    expected = inference_model(model, image).pred_sem_seg.data[0].numpy()
    inferencer = MMSegInferencer(*segmentor, device='cpu')
    result = inferencer(image, out_dir=str(tmp_path), show=False)
    assert np.array_equal(result['predictions'], expected)
    assert len(list((tmp_path / 'vis').iterdir())) == 1


def test_image_classification_inferencer(tmp_path: Path, image) -> None:
    cfg = Config.fromfile(
        ROOT / 'configs/classification/vit-tiny_pm_in1k_samples.py'
    )
    cfg.model.backbone.arch = dict(
        embed_dims=24, num_layers=4, num_heads=3, feedforward_channels=48
    )
    cfg.model.head.update(in_channels=24, num_classes=5)
    cfg.model.data_preprocessor.num_classes = 5
    cfg.model.update(type='ImageClassifier')
    cfg.model.pop('teacher', None)
    names = ('cat', 'dog', 'car', 'tree', 'cup')
    config, checkpoint = save_compressed(cfg, names, tmp_path)
    inferencer = ImageClassificationInferencer(
        config, pretrained=checkpoint, device='cpu'
    )
    assert inferencer.model.backbone.compressor.compressed
    result = inferencer(image)[0]
    assert result['pred_class'] in names
    assert result['pred_scores'].sum() == pytest.approx(1, abs=1e-5)
    init_default_scope('mmseg')
