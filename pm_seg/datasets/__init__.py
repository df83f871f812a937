from .reproducible import NumberedInfiniteSampler, SeedAugmentation

__all__ = ['NumberedInfiniteSampler', 'SeedAugmentation']
