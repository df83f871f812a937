# DINOv3 ViT-S with a linear head on frozen features, compressed and fine-tuned
# from the checkpoint of its dense twin.
_base_ = [
    './_base_/models/linear_dinov3-s.py',
    './_base_/datasets/ade20k.py',
    './_base_/default_runtime.py',
    './_base_/schedules/finetune_64k.py',
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(alpha=1.0, tau=20.0),
    backbone=dict(compression=dict(keep=0.5)),
)
load_from = 'work_dirs/linear_dinov3-s_ade20k/iter_40000.pth'
