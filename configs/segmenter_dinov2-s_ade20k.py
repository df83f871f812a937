# DINOv2 ViT-S with Segmenter's mask transformer, dense, from timm's weights.
_base_ = [
    './_base_/models/segmenter_dinov2-s.py',
    './_base_/datasets/ade20k_518x518.py',
    './_base_/default_runtime.py',
    './_base_/schedules/train_40k_adamw.py',
]
model = dict(backbone=dict(pretrained=True))
