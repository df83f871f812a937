# Segmenter ViT-s (mask transformer), dense, from ImageNet weights.
# Published result of mmseg's checkpoint: 46.19 mIoU (single scale).
_base_ = [
    './_base_/models/segmenter_vit-s.py',
    './_base_/datasets/ade20k.py',
    './_base_/default_runtime.py',
    './_base_/schedules/train_160k.py',
]
model = dict(
    pretrained='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segmenter/vit_small_p16_384_20220308-410f6037.pth',  # noqa: E501
)
train_dataloader = dict(batch_size=1)
