# Segmenter ViT-s (mask transformer) on Pascal Context, dense, from ImageNet
# weights.
_base_ = [
    './_base_/models/segmenter_vit-s_pascal_context.py',
    './_base_/datasets/pascal_context.py',
    './_base_/default_runtime.py',
    './_base_/schedules/train_80k.py',
]
model = dict(
    pretrained='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segmenter/vit_small_p16_384_20220308-410f6037.pth',  # noqa: E501
)
train_dataloader = dict(batch_size=1)
