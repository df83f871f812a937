# Segmenter ViT-s (mask transformer) on Pascal Context, compressed and
# fine-tuned from the checkpoint of its dense twin.
_base_ = [
    './_base_/models/segmenter_vit-s_pascal_context.py',
    './_base_/datasets/pascal_context.py',
    './_base_/default_runtime.py',
    './_base_/schedules/finetune_10k.py',
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(alpha=1.0, tau=20.0),
    backbone=dict(compression=dict(keep=0.5)),
)
load_from = 'work_dirs/segmenter_vit-s_pascal_context/iter_80000.pth'
