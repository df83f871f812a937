# The ViT-Ti/16 of Steiner et al., arXiv 2106.10270 (timm: augreg).
_base_ = './deit-tiny.py'
model = dict(
    data_preprocessor=dict(
        mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]
    )
)
