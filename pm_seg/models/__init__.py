from .backbones import PMVisionTransformer
from .decode_heads import PMSegmenterMaskTransformerHead

__all__ = ['PMSegmenterMaskTransformerHead', 'PMVisionTransformer']
