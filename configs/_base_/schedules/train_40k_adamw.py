# Pretrained Vision Transformers: AdamW, 40k iterations, total batch size 16.
_base_ = './common.py'
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4),
)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.01, begin=0, end=1000, by_epoch=False
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        begin=1000,
        end=40000,
        by_epoch=False,
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000, save_best='mIoU'))
custom_hooks = [dict(type='SeedIterationHook')]
randomness = dict(seed=0)
auto_scale_lr = dict(enable=False, base_batch_size=16)
