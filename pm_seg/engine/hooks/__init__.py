from .progress_hook import ProgressHook
from .prune_merge_hook import PruneMergeHook
from .seed_hook import SeedIterationHook
from .visualization_hook import CompressionVisualizationHook

__all__ = [
    'CompressionVisualizationHook',
    'ProgressHook',
    'PruneMergeHook',
    'SeedIterationHook',
]
