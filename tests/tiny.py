"""A segmentor of two tiny transformers, and batches for it."""

from __future__ import annotations

import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

PREPROCESSOR = dict(
    type='SegDataPreProcessor',
    mean=[127.5] * 3,
    std=[127.5] * 3,
    size=(64, 64),
    seg_pad_val=255,
)


def config(compression: dict | None) -> dict:
    """Of a tiny segmentor that drops much in training."""
    return dict(
        type='EncoderDecoder',
        data_preprocessor=dict(PREPROCESSOR),
        backbone=dict(
            type='PMVisionTransformer',
            img_size=64,
            embed_dims=24,
            num_layers=3,
            num_heads=3,
            drop_path_rate=0.5,
            drop_rate=0.2,
            compression=compression,
        ),
        decode_head=dict(
            type='PMSegmenterMaskTransformerHead',
            in_channels=24,
            channels=24,
            num_classes=5,
            num_layers=2,
            num_heads=3,
            embed_dims=24,
            dropout_ratio=0.3,
            loss_decode=dict(type='CrossEntropyLoss'),
        ),
    )


def build(compression: bool = True, with_cp: bool = False, **options):
    """A tiny segmentor; options are those of its compression."""
    if options.get('type') != 'paper':
        options.setdefault('keep', 0.5)
    cfg = config(options if compression else None)
    cfg['backbone']['with_cp'] = with_cp
    return build_from(cfg)


def build_from(cfg: dict):
    """A segmentor with its initial weights, the same every time."""
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def batch(first: int, count: int) -> dict:
    inputs, samples = [], []
    for i in range(first, first + count):
        generator = torch.Generator().manual_seed(i)
        inputs.append(
            torch.randint(0, 255, (3, 64, 64), generator=generator).byte()
        )
        label = torch.randint(0, 5, (1, 64, 64), generator=generator)
        label[label == 4] = 255
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label)))
    return dict(inputs=inputs, data_samples=samples)
