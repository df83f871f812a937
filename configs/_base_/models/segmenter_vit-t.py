_base_ = './segmenter_vit-b.py'
model = dict(
    backbone=dict(embed_dims=192, num_heads=3),
    decode_head=dict(
        in_channels=192, channels=192, num_heads=3, embed_dims=192
    ),
)
