from .backbones import PMTimmVisionTransformer, PMVisionTransformer
from .decode_heads import PMSegmenterMaskTransformerHead
from .segmentors import DistilledEncoderDecoder

__all__ = [
    'DistilledEncoderDecoder',
    'PMSegmenterMaskTransformerHead',
    'PMTimmVisionTransformer',
    'PMVisionTransformer',
]
