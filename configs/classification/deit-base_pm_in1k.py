# DeiT-B, compressed and fine-tuned from mmpretrain's published checkpoint
# (81.76 top-1).
# The paper's form is deit-base_pm-paper_in1k.py.
_base_ = [
    '../_base_/models/deit-base.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/classification_runtime.py',
    '../_base_/schedules/finetune_30e.py',
]
model = dict(
    type='DistilledImageClassifier',
    teacher=dict(alpha=1.0, tau=1.0),
    backbone=dict(compression=dict(keep=0.6)),
)
load_from = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-base_pt-16xb64_in1k_20220216-db63c16c.pth'  # noqa: E501
