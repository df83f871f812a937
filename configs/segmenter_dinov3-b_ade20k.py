# DINOv3 ViT-B with Segmenter's mask transformer, dense, from timm's weights.
_base_ = [
    './_base_/models/segmenter_dinov3-b.py',
    './_base_/datasets/ade20k.py',
    './_base_/default_runtime.py',
    './_base_/schedules/train_40k_adamw.py',
]
model = dict(backbone=dict(pretrained=True))
