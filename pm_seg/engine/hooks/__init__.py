from .prune_merge_hook import PruneMergeHook

__all__ = ['PruneMergeHook']
