from .checkpoint_hook import WholeCheckpointHook
from .guard_hook import RunGuardHook
from .interrupt_hook import InterruptHook
from .progress_hook import ProgressHook
from .prune_merge_hook import PruneMergeHook
from .seed_hook import SeedIterationHook
from .visualization_hook import CompressionVisualizationHook

__all__ = [
    'CompressionVisualizationHook',
    'InterruptHook',
    'ProgressHook',
    'PruneMergeHook',
    'RunGuardHook',
    'SeedIterationHook',
    'WholeCheckpointHook',
]
