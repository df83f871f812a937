_base_ = './linear_dinov3-s.py'
model = dict(
    backbone=dict(model_name='vit_base_patch16_dinov3.lvd1689m'),
    decode_head=dict(in_channels=768, channels=768),
)
