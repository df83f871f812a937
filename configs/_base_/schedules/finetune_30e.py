# Fine-tuning a compressed classifier by the paper's protocol: AdamW, 1e-4 with
# cosine decay, 30 epochs, at a total batch size of 1024. Weight decay is
# DeiT's 0.05, on weight matrices alone.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys={
            '.cls_token': dict(decay_mult=0.0),
            '.dist_token': dict(decay_mult=0.0),
            '.pos_embed': dict(decay_mult=0.0),
            'compressor': dict(lr_mult=1.0, decay_mult=0.0),
        },
    ),
)
max_epochs = 30
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.01,
        begin=0,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        begin=1,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(
    type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1
)
custom_hooks = [
    dict(type='PruneMergeHook'),
    dict(type='SeedIterationHook'),
]
randomness = dict(seed=0)
auto_scale_lr = dict(enable=False, base_batch_size=1024)
