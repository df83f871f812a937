# A small Segmenter that trains from scratch within minutes on a CPU.
_base_ = './segmenter_vit-t.py'
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(img_size=(256, 256), num_layers=6, drop_path_rate=0.0),
    decode_head=dict(num_classes=24, drop_path_rate=0.0),
    test_cfg=dict(_delete_=True, mode='whole'),
)
