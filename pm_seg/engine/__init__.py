from .hooks import ProgressHook, PruneMergeHook, SeedIterationHook
from .optimizers import PMLayerDecayOptimWrapperConstructor
from .report import describe
from .scoring import apply_scores, gather_scores
from .targets import meet_target

__all__ = [
    'PMLayerDecayOptimWrapperConstructor',
    'ProgressHook',
    'PruneMergeHook',
    'SeedIterationHook',
    'apply_scores',
    'describe',
    'gather_scores',
    'meet_target',
]
