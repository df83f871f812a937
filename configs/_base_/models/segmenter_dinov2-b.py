_base_ = './segmenter_dinov2-s.py'
model = dict(
    backbone=dict(model_name='vit_base_patch14_dinov2.lvd142m'),
    decode_head=dict(
        in_channels=768, channels=768, num_heads=12, embed_dims=768
    ),
)
