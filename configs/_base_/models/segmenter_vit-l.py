_base_ = './segmenter_vit-b.py'
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(
        img_size=(640, 640), embed_dims=1024, num_layers=24, num_heads=16
    ),
    decode_head=dict(
        in_channels=1024, channels=1024, num_heads=16, embed_dims=1024
    ),
    test_cfg=dict(mode='slide', crop_size=(640, 640), stride=(608, 608)),
)
