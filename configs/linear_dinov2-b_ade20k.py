# DINOv2 ViT-B, a linear head on frozen features, dense, timm's weights.
_base_ = [
    './_base_/models/linear_dinov2-b.py',
    './_base_/datasets/ade20k_518x518.py',
    './_base_/default_runtime.py',
    './_base_/schedules/train_40k_adamw.py',
]
model = dict(backbone=dict(pretrained=True))
