# The same for a small dataset: 700 iterations at a total batch size of 8.
_base_ = './finetune_64k.py'
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=50, by_epoch=False),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        begin=50,
        end=700,
        by_epoch=False,
    ),
]
train_cfg = dict(max_iters=700, val_interval=350)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=350))
custom_hooks = [
    dict(type='PruneMergeHook', evaluate=True),
    dict(type='SeedIterationHook'),
]
auto_scale_lr = dict(base_batch_size=8)
