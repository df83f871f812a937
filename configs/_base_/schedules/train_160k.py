# mmseg's Segmenter schedule: 160k iterations, total batch size 8, SGD.
_base_ = './common.py'
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.001, momentum=0.9, weight_decay=0.0),
    clip_grad=None,
)
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1e-4,
        power=0.9,
        begin=0,
        end=160000,
        by_epoch=False,
    )
]
train_cfg = dict(
    type='IterBasedTrainLoop', max_iters=160000, val_interval=16000
)
default_hooks = dict(checkpoint=dict(interval=16000, save_best='mIoU'))
auto_scale_lr = dict(enable=False, base_batch_size=8)
