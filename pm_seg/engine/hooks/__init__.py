from .progress_hook import ProgressHook
from .prune_merge_hook import PruneMergeHook
from .seed_hook import SeedIterationHook

__all__ = ['ProgressHook', 'PruneMergeHook', 'SeedIterationHook']
