_base_ = './segmenter_vit-t.py'
model = dict(
    data_preprocessor=dict(size=(352, 480)),
    backbone=dict(img_size=(352, 480)),
    decode_head=dict(
        num_classes=11, norm_cfg=dict(type='LN', eps=1e-6, requires_grad=True)
    ),
    test_cfg=dict(_delete_=True, mode='whole'),
)
