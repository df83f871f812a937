# Segmenter ViT-T on CamVid, dense, fine-tuned from a CamVid checkpoint.
_base_ = [
    './_base_/models/segmenter_vit-t_camvid.py',
    './_base_/datasets/camvid.py',
    './_base_/default_runtime.py',
    './_base_/schedules/finetune_700.py',
]
load_from = 'checkpoints/segmenter_vit-t_camvid.pth'
custom_hooks = [dict(type='SeedIterationHook')]
