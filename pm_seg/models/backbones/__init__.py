from .timm_backbone import PMTimmVisionTransformer
from .vit import PMVisionTransformer

__all__ = ['PMTimmVisionTransformer', 'PMVisionTransformer']
