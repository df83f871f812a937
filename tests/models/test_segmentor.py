"""Whole segmentors: stock against ours, inference modes, real weights."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, shared_path
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from pm_seg.utils.checkpoints import read_checkpoint

STOCK = {
    'PMVisionTransformer': 'VisionTransformer',
    'PMSegmenterMaskTransformerHead': 'SegmenterMaskTransformerHead',
}


def camvid_model(dense: bool = True, stock: tuple[str, ...] = ()):
    init_default_scope('mmseg')
    name = 'segmenter_vit-t_camvid' if dense else 'segmenter_vit-t_pm_camvid'
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py').model
    for part in stock:
        cfg[part]['type'] = STOCK[cfg[part]['type']]
    if 'backbone' in stock:
        cfg.backbone.patch_bias = True
    model = MODELS.build(cfg)
    path = shared_path('weights/segmenter_vit-t_camvid.pth')
    state = read_checkpoint(path)['state_dict']
    load_state_dict(model, state, strict=dense)
    return model.eval()


def camvid_images(size: tuple[int, int], count: int = 3) -> torch.Tensor:
    folder = shared_path('data/camvid/images/val')
    images = [
        cv2.resize(cv2.imread(str(path)), size[::-1])[..., ::-1]
        for path in sorted(folder.iterdir())[:count]
    ]
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return batch.float() / 127.5 - 1


BOTH = ('backbone', 'decode_head')


@pytest.mark.parametrize(
    ('ours', 'size'),
    [
        (('backbone',), (97, 211)),
        (('decode_head',), (97, 211)),
        (BOTH, (97, 211)),
        (BOTH, (360, 480)),
    ],
)
def test_camvid_logits_equal_stock(ours, size) -> None:
    """Real weights on real images, each of our parts with the stock one."""
    stock = camvid_model(stock=BOTH)
    mixed = camvid_model(stock=tuple(p for p in BOTH if p not in ours))
    images = camvid_images(size)
    with torch.no_grad():
        expected, actual = stock(images), mixed(images)
    assert actual.shape[2:] == tuple(-(-n // 16) for n in size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_camvid_compressed_agrees_with_dense() -> None:
    """A dense checkpoint in a compressed config, with nothing measured."""
    model, images = camvid_model(dense=False), camvid_images((360, 480))
    compressor = model.backbone.compressor
    with compressor.disabled():
        dense = model(images).argmax(1)
    for keep, agreement in ((0.7, 0.995), (0.5, 0.985), (0.35, 0.965)):
        compressor.set_keep(keep)
        assert compressor.share <= keep
        same = (model(images).argmax(1) == dense).double().mean()
        assert same > agreement


def small_model(test_cfg: dict, compressed: bool = True):
    init_default_scope('mmseg')
    cfg = Config.fromfile(ROOT / 'configs/demo/segmenter_pm_scenes.py').model
    cfg.backbone.update(img_size=(64, 64), num_layers=2)
    cfg.backbone.compression.keep = 0.7
    cfg.data_preprocessor.size = (64, 64)
    cfg.teacher = None
    cfg.test_cfg = test_cfg
    if not compressed:
        cfg.backbone.compression = None
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model.eval()


def predict(model, size: tuple[int, int]):
    inputs = torch.randint(0, 255, (3, *size), dtype=torch.uint8)
    sample = SegDataSample(
        metainfo=dict(
            img_shape=size,
            ori_shape=(size[0] + 5, size[1] + 3),
            pad_shape=size,
            padding_size=[0, 0, 0, 0],
        )
    )
    return model.test_step(dict(inputs=[inputs], data_samples=[sample]))[0]


SLIDE = dict(mode='slide', crop_size=(64, 64), stride=(48, 48))


@pytest.mark.parametrize('test_cfg', [SLIDE, dict(mode='whole')])
@pytest.mark.parametrize('size', [(360, 480), (97, 211), (50, 30)])
def test_slide_and_whole_inference(test_cfg, size) -> None:
    """Any size, also smaller than the crop; the map is always full."""
    out = predict(small_model(dict(test_cfg)), size)
    assert out.pred_sem_seg.shape == (size[0] + 5, size[1] + 3)
    assert torch.isfinite(out.seg_logits.data).all()


def test_test_time_augmentation() -> None:
    from mmseg.models import SegTTAModel

    model = small_model(dict(mode='whole'))
    tta = SegTTAModel(module=model)
    samples, inputs = [], []
    for scale in (64, 96):
        for flip in (False, True):
            size = (scale, scale + 16)
            inputs.append([torch.randint(0, 255, (3, *size)).byte()])
            samples.append(
                [
                    SegDataSample(
                        metainfo=dict(
                            img_shape=size,
                            img_path='x.jpg',
                            ori_shape=(70, 90),
                            pad_shape=size,
                            flip=flip,
                            flip_direction='horizontal' if flip else None,
                        )
                    )
                ]
            )
    out = tta.test_step(dict(inputs=inputs, data_samples=samples))
    assert out[0].pred_sem_seg.shape == (70, 90)


@pytest.mark.parametrize('size', [(360, 480), (97, 211)])
def test_batch_of_four_equals_four_of_one(size) -> None:
    model = small_model(dict(mode='whole'))
    images = torch.randn(4, 3, *size)
    with torch.no_grad():
        whole = model(images)
        for i in range(4):
            torch.testing.assert_close(
                model(images[i : i + 1]), whole[i : i + 1], rtol=0, atol=1e-4
            )


@pytest.mark.parametrize('amp', [False, True])
def test_training_step(amp: bool) -> None:
    model = small_model(dict(mode='whole')).train()
    label = PixelData(data=torch.randint(0, 24, (1, 64, 64)))
    batch = dict(
        inputs=[torch.randint(0, 255, (3, 64, 64)).byte() for _ in range(2)],
        data_samples=[SegDataSample(gt_sem_seg=label) for _ in range(2)],
    )
    data = model.data_preprocessor(batch, training=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        losses = model(**data, mode='loss')
    model.parse_losses(losses)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.backbone.compressor.gain.grad.any()
