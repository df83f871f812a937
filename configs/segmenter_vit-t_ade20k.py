# Segmenter ViT-t (mask transformer), dense, from ImageNet weights.
# Published result of mmseg's checkpoint: 39.99 mIoU (single scale).
_base_ = [
    './_base_/models/segmenter_vit-t.py',
    './_base_/datasets/ade20k.py',
    './_base_/default_runtime.py',
    './_base_/schedules/train_160k.py',
]
model = dict(
    pretrained='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segmenter/vit_tiny_p16_384_20220308-cce8c795.pth',  # noqa: E501
)
train_dataloader = dict(batch_size=1)
