# Segmenter ViT-l (mask transformer), dense, from ImageNet weights.
# Published result of mmseg's checkpoint: 52.16 mIoU (single scale).
_base_ = [
    './_base_/models/segmenter_vit-l.py',
    './_base_/datasets/ade20k_640x640.py',
    './_base_/default_runtime.py',
    './_base_/schedules/train_160k.py',
]
model = dict(
    pretrained='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segmenter/vit_large_p16_384_20220308-d4efb41d.pth',  # noqa: E501
)
train_dataloader = dict(batch_size=1)
