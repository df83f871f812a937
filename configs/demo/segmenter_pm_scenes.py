# The small Segmenter, compressed, fine-tuned on whole images from the dense
# checkpoint.
_base_ = './segmenter_scenes.py'
crop_size = (512, 512)
train_pipeline = [
    dict(type='SeedAugmentation'),
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(
        type='RandomResize',
        scale={{_base_.scale}},
        ratio_range=(1.0, 1.2),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.9),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
model = dict(
    type='DistilledEncoderDecoder',
    teacher=dict(alpha=0.5, tau=20.0),
    data_preprocessor=dict(size=crop_size),
    backbone=dict(compression=dict(keep=0.5)),
)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
max_iters = 24
optim_wrapper = dict(optimizer=dict(lr=5e-5))
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
    dict(type='PruneMergeHook', calib_batches=4),
    dict(type='ProgressHook', title='Fine-tuning, compressed'),
]
