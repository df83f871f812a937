# ViT-Ti on CIFAR-10, compressed and fine-tuned from the dense run.
_base_ = [
    '../_base_/models/vit-tiny.py',
    '../_base_/datasets/cifar10_224.py',
    '../_base_/classification_runtime.py',
    '../_base_/schedules/finetune_3e.py',
]
model = dict(
    type='DistilledImageClassifier',
    teacher=dict(alpha=1.0, tau=1.0),
    backbone=dict(compression=dict(keep=0.7)),
    head=dict(num_classes=10),
)
load_from = 'work_dirs/vit-tiny_cifar10/epoch_3.pth'
