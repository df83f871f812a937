_base_ = './segmenter_vit-b.py'
model = dict(
    backbone=dict(embed_dims=384, num_heads=6),
    decode_head=dict(
        in_channels=384, channels=384, num_heads=6, embed_dims=384
    ),
)
