# DeiT-S, compressed and fine-tuned from mmpretrain's published checkpoint
# (80.69 top-1).
_base_ = [
    '../_base_/models/deit-small.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/classification_runtime.py',
    '../_base_/schedules/finetune_30e.py',
]
model = dict(
    type='DistilledImageClassifier',
    teacher=dict(alpha=1.0, tau=1.0),
    backbone=dict(compression=dict(keep=0.5)),
)
load_from = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'  # noqa: E501
