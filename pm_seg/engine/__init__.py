from .compression import apply_scores, compress
from .hooks import (
    CompressionVisualizationHook,
    InterruptHook,
    ProgressHook,
    PruneMergeHook,
    RunGuardHook,
    SeedIterationHook,
    WholeCheckpointHook,
)
from .optimizers import PMLayerDecayOptimWrapperConstructor
from .report import describe
from .scoring import gather_scores
from .targets import meet_target

__all__ = [
    'CompressionVisualizationHook',
    'InterruptHook',
    'PMLayerDecayOptimWrapperConstructor',
    'ProgressHook',
    'PruneMergeHook',
    'RunGuardHook',
    'SeedIterationHook',
    'WholeCheckpointHook',
    'apply_scores',
    'compress',
    'describe',
    'gather_scores',
    'meet_target',
]
