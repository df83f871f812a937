# DeiT-Ti, compressed as in the paper: by position, one threshold for all
# layers, 10 % of the tokens pruned.
_base_ = './deit-tiny_pm_in1k.py'
model = dict(
    backbone=dict(
        compression=dict(
            _delete_=True,
            type='paper',
            keep_rate=0.7,
            prune_rate=0.1,
            threshold='global',
            decay=0.025,
        ),
    ),
)
