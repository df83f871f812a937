# ViT-B fine-tuned from MAE: classifies the mean of the patch tokens.
_base_ = './deit-base.py'
model = dict(
    backbone=dict(arch='base', out_type='avg_featmap', final_norm=False),
    head=dict(type='LinearClsHead'),
)
