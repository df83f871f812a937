from ..visualization.layers import describe
from .compression import Measuring, compress
from .hooks.checkpoint_hook import WholeCheckpointHook
from .hooks.guard_hook import RunGuardHook
from .hooks.interrupt_hook import InterruptHook
from .hooks.progress_hook import ProgressHook
from .hooks.prune_merge_hook import PruneMergeHook
from .hooks.seed_hook import SeedIterationHook
from .hooks.visualization_hook import CompressionVisualizationHook
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
