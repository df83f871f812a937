# Segmenter's mask transformer on DINOv2 ViT-S, all of it trained.
_base_ = './linear_dinov2-s.py'
model = dict(
    backbone=dict(frozen_stages=-1, drop_path_rate=0.1),
    decode_head=dict(
        _delete_=True,
        type='PMSegmenterMaskTransformerHead',
        in_channels=384,
        channels=384,
        num_classes=150,
        num_layers=2,
        num_heads=6,
        embed_dims=384,
        dropout_ratio=0.0,
        loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0
        ),
    ),
)
