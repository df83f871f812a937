from .reproducible import (
    NumberedInfiniteSampler,
    NumberedSampler,
    SeedAugmentation,
)

__all__ = ['NumberedInfiniteSampler', 'NumberedSampler', 'SeedAugmentation']
