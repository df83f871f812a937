# Segmenter ViT-l (mask transformer) on Cityscapes, dense, from ImageNet
# weights.
_base_ = [
    './_base_/models/segmenter_vit-l_cityscapes.py',
    './_base_/datasets/cityscapes_768x768.py',
    './_base_/default_runtime.py',
    './_base_/schedules/train_80k.py',
]
model = dict(
    pretrained='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segmenter/vit_large_p16_384_20220308-d4efb41d.pth',  # noqa: E501
)
train_dataloader = dict(batch_size=1)
