# ViT-B from MAE, compressed and fine-tuned from the published checkpoint
# (83.5 top-1).
_base_ = [
    '../_base_/models/vit-base-mae.py',
    '../_base_/datasets/imagenet_224.py',
    '../_base_/classification_runtime.py',
    '../_base_/schedules/finetune_30e.py',
]
model = dict(
    type='DistilledImageClassifier',
    teacher=dict(alpha=1.0, tau=1.0),
    backbone=dict(compression=dict(keep=0.6)),
)
load_from = 'https://download.openmmlab.com/mmselfsup/1.x/mae/mae_vit-base-p16_8xb512-fp16-coslr-1600e_in1k/vit-base-p16_ft-8xb128-coslr-100e_in1k/vit-base-p16_ft-8xb128-coslr-100e_in1k_20220825-cf70aa21.pth'  # noqa: E501
