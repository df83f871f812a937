from .compression import apply_scores, compress
from .hooks import (
    CompressionVisualizationHook,
    ProgressHook,
    PruneMergeHook,
    SeedIterationHook,
)
from .optimizers import PMLayerDecayOptimWrapperConstructor
from .report import describe
from .scoring import gather_scores
from .targets import meet_target

__all__ = [
    'CompressionVisualizationHook',
    'PMLayerDecayOptimWrapperConstructor',
    'ProgressHook',
    'PruneMergeHook',
    'SeedIterationHook',
    'apply_scores',
    'compress',
    'describe',
    'gather_scores',
    'meet_target',
]
