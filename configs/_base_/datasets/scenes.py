# Drawn scenes in ADE20K layout, written by tools/make_scenes.py.
_base_ = './ade20k.py'
data_root = 'data/scenes'
# Only the classes that are drawn, so that the loss is not mostly zeros.
metainfo = dict(
    classes=(
        'wall',
        'building',
        'sky',
        'floor',
        'tree',
        'ceiling',
        'road',
        'bed ',
        'windowpane',
        'grass',
        'cabinet',
        'sidewalk',
        'person',
        'door',
        'table',
        'mountain',
        'chair',
        'car',
        'painting',
        'fence',
        'lamp',
        'signboard',
        'streetlight',
        'pole',
    )
)
crop_size = (256, 256)
train_pipeline = [
    dict(type='SeedAugmentation'),
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(
        type='RandomResize',
        scale=(1024, 256),
        ratio_range=(0.9, 1.3),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.9),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
calib_pipeline = None  # the training crops are much like test images
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1024, 256), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
# In the process itself: images are small, and the cores busy with the model.
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root, metainfo=metainfo, pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root, metainfo=metainfo, pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
