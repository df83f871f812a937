# The same for a small dataset: 3 epochs at a total batch size of 128, without
# warm-up.
_base_ = './finetune_30e.py'
max_epochs = 3
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        begin=0,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=max_epochs)
custom_hooks = [
    dict(type='PruneMergeHook', evaluate=True),
    dict(type='SeedIterationHook'),
]
auto_scale_lr = dict(base_batch_size=128)
