from .progress_hook import ProgressHook
from .prune_merge_hook import PruneMergeHook

__all__ = ['ProgressHook', 'PruneMergeHook']
