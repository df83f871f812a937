from .vit import PMVisionTransformer

__all__ = ['PMVisionTransformer']
