# ViT-Ti on CIFAR-10, dense, fine-tuned from ImageNet weights.
_base_ = [
    '../_base_/models/vit-tiny.py',
    '../_base_/datasets/cifar10_224.py',
    '../_base_/classification_runtime.py',
    '../_base_/schedules/finetune_3e.py',
]
model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained', checkpoint='checkpoints/vit-tiny_in1k.pth'
        )
    ),
    head=dict(num_classes=10),
)
custom_hooks = [dict(type='SeedIterationHook')]
