# SigLIP 2 ViT-B/16, compressed and fine-tuned from the dense run.
_base_ = [
    '../_base_/models/siglip2-base.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/classification_runtime.py',
    '../_base_/schedules/finetune_30e.py',
]
model = dict(
    type='DistilledImageClassifier',
    teacher=dict(alpha=1.0, tau=1.0),
    backbone=dict(compression=dict(keep=0.6)),
)
load_from = 'work_dirs/siglip2-base_in1k/epoch_30.pth'
