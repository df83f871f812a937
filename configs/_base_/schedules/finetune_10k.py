# finetune_64k.py for the smaller datasets: 10k iterations at a total batch
# size of 16 are 54 epochs of Cityscapes (2975 images) and 32 of Pascal
# Context (4998).
_base_ = './finetune_64k.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=500, by_epoch=False),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        begin=500,
        end=10000,
        by_epoch=False,
    ),
]
train_cfg = dict(max_iters=10000, val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=1000))
