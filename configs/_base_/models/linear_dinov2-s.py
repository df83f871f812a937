# DINOv2 ViT-S/14 at 518x518, 37x37 patches.
_base_ = './linear_dinov3-s.py'
model = dict(
    data_preprocessor=dict(size=(518, 518)),
    backbone=dict(
        model_name='vit_small_patch14_dinov2.lvd142m', img_size=(518, 518)
    ),
    test_cfg=dict(crop_size=(518, 518), stride=(490, 490)),
)
