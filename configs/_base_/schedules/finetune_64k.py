# Fine-tuning a compressed model by the paper's protocol: AdamW, 1e-4 with
# cosine decay, weight decay 1e-4, 50 epochs of ADE20K (20210 images) at a
# total batch size of 16. Merge and restore weights are not decayed.
_base_ = './common.py'
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=1e-4),
    paramwise_cfg=dict(
        custom_keys={'compressor': dict(lr_mult=1.0, decay_mult=0.0)}
    ),
)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.01, begin=0, end=1000, by_epoch=False
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        begin=1000,
        end=64000,
        by_epoch=False,
    ),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=64000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=4000, save_best='mIoU'))
custom_hooks = [
    dict(type='PruneMergeHook', score_batches=200),
    dict(type='SeedIterationHook'),
]
randomness = dict(seed=0)
auto_scale_lr = dict(enable=False, base_batch_size=16)
