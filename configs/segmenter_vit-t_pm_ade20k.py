# Segmenter ViT-t (mask transformer), compressed and fine-tuned from mmseg's
# published dense checkpoint.
_base_ = [
    './_base_/models/segmenter_vit-t.py',
    './_base_/datasets/ade20k.py',
    './_base_/default_runtime.py',
    './_base_/schedules/finetune_64k.py',
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(alpha=1.0, tau=20.0),
    backbone=dict(compression=dict(keep=0.5)),
)
load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/segmenter/segmenter_vit-t_mask_8x1_512x512_160k_ade20k/segmenter_vit-t_mask_8x1_512x512_160k_ade20k_20220105_151706-ffcf7509.pth'  # noqa: E501
