from .segmenter_mask_head import PMSegmenterMaskTransformerHead

__all__ = ['PMSegmenterMaskTransformerHead']
