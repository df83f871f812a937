_base_ = './deit-base.py'
model = dict(
    backbone=dict(arch='deit-small', drop_path_rate=0.0),
    head=dict(in_channels=384),
)
