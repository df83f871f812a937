# Segmenter ViT-T on CamVid, compressed as in the paper: all layers but the
# first by position, 30 % of the tokens of each merged away.
_base_ = './segmenter_vit-t_pm_camvid.py'
model = dict(
    backbone=dict(
        compression=dict(
            _delete_=True,
            type='paper',
            keep_rate=0.7,
            threshold='layer',
            layers=list(range(1, 12)),
        ),
    ),
)
