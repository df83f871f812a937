# ViT-Ti on a folder of labelled ImageNet pictures, compressed.
_base_ = [
    '../_base_/models/vit-tiny.py',
    '../_base_/datasets/imagenet_samples.py',
    '../_base_/classification_runtime.py',
    '../_base_/schedules/finetune_3e.py',
]
model = dict(
    type='DistilledImageClassifier',
    teacher=dict(alpha=1.0, tau=1.0),
    backbone=dict(compression=dict(keep=0.7)),
)
custom_hooks = [
    # 10 batches of 20: one prediction for each picture says little.
    dict(type='PruneMergeHook', calib_batches=10, evaluate=True),
    dict(type='SeedIterationHook'),
]
load_from = 'checkpoints/vit-tiny_in1k.pth'
