# ViT-Ti on a folder of labelled ImageNet pictures, dense.
_base_ = [
    '../_base_/models/vit-tiny.py',
    '../_base_/datasets/imagenet_samples.py',
    '../_base_/classification_runtime.py',
    '../_base_/schedules/finetune_3e.py',
]
load_from = 'checkpoints/vit-tiny_in1k.pth'
custom_hooks = [dict(type='SeedIterationHook')]
