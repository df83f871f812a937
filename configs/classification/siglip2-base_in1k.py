# SigLIP 2 ViT-B/16, dense, fine-tuned on ImageNet from timm's weights.
_base_ = [
    '../_base_/models/siglip2-base.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/classification_runtime.py',
    '../_base_/schedules/finetune_30e.py',
]
model = dict(backbone=dict(pretrained=True))
custom_hooks = [dict(type='SeedIterationHook')]
