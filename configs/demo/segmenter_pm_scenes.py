# The small Segmenter, compressed and fine-tuned from the dense checkpoint.
_base_ = './segmenter_scenes.py'
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(alpha=0.5, tau=20.0),
    backbone=dict(compression=dict(keep=0.5)),
)
max_iters = 200
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(
        type='CosineAnnealingLR',
        eta_min=0.0,
        begin=0,
        end=max_iters,
        by_epoch=False,
    )
]
train_cfg = dict(max_iters=max_iters)
custom_hooks = [
    dict(type='PruneMergeHook'),
    dict(type='ProgressHook', title='Fine-tuning, compressed'),
]
