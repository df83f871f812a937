# A folder of labelled ImageNet pictures: FILE.jpg and labels.txt with a line
# "FILE.jpg CLASS_INDEX" for each. Where to find it is for the user to say:
# --cfg-options data_root=DIR. Small folders are for comparing models, before
# and after compression; training, calibration and test are the same pictures.
_base_ = './imagenet_224.py'
data_root = 'data/imagenet_samples'
train_pipeline = [
    dict(type='SeedAugmentation'),
    dict(type='LoadImageFromFile'),
    dict(
        type='RandomResizedCrop',
        scale=224,
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='ResizeEdge',
        scale=232,
        edge='short',
        backend='cv2',
        interpolation='bicubic',
    ),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
# What compression measures on: images as in testing.
calib_pipeline = test_pipeline
train_dataloader = dict(
    batch_size=20,
    num_workers=2,
    dataset=dict(
        data_root=data_root,
        split='',
        ann_file='labels.txt',
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=2,
    dataset=dict(
        data_root=data_root,
        split='',
        ann_file='labels.txt',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
