# SigLIP 2 ViT-B/16 with its attention pooling.
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='PMTimmVisionTransformer',
        model_name='vit_base_patch16_siglip_224.v2_webli',
        img_size=224,
        out_type='pooled',
        drop_path_rate=0.1,
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=768,
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
        ),
    ),
    data_preprocessor=dict(
        type='ClsDataPreprocessor',
        num_classes=1000,
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        to_rgb=True,
    ),
)
