from .hooks import ProgressHook, PruneMergeHook
from .scoring import apply_scores, describe, gather_scores

__all__ = [
    'ProgressHook',
    'PruneMergeHook',
    'apply_scores',
    'describe',
    'gather_scores',
]
