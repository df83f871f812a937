from ..visualization.layers import describe
from .compression import Measuring, compress
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
from .scoring import gather_scores
from .targets import meet_target

__all__ = [
    'CompressionVisualizationHook',
    'InterruptHook',
    'Measuring',
    'PMLayerDecayOptimWrapperConstructor',
    'ProgressHook',
    'PruneMergeHook',
    'RunGuardHook',
    'SeedIterationHook',
    'WholeCheckpointHook',
    'compress',
    'describe',
    'gather_scores',
    'meet_target',
]
