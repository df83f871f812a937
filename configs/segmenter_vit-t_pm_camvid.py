# Segmenter ViT-T on CamVid, compressed and fine-tuned from a dense
# checkpoint.
_base_ = [
    './_base_/models/segmenter_vit-t_camvid.py',
    './_base_/datasets/camvid.py',
    './_base_/default_runtime.py',
    './_base_/schedules/finetune_700.py',
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(alpha=1.0, tau=20.0),
    backbone=dict(compression=dict(keep=0.5)),
)
load_from = 'checkpoints/segmenter_vit-t_camvid.pth'
