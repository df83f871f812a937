# EVA-02 ViT-S with UPerNet, compressed and fine-tuned
# from the checkpoint of its dense twin.
_base_ = [
    './_base_/models/upernet_eva02-s.py',
    './_base_/datasets/ade20k_518x518.py',
    './_base_/default_runtime.py',
    './_base_/schedules/finetune_64k.py',
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(alpha=1.0, tau=20.0),
    backbone=dict(compression=dict(keep=0.5)),
)
load_from = 'work_dirs/upernet_eva02-s_ade20k/iter_40000.pth'
