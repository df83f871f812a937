from .hooks import PruneMergeHook
from .scoring import apply_scores, describe, gather_scores

__all__ = ['PruneMergeHook', 'apply_scores', 'describe', 'gather_scores']
