"""Prune-and-Merge token compression in plain PyTorch.

Nothing in this package imports OpenMMLab: it serves any transformer.
"""

from .base import Compressor
from .compressor import TokenCompressor
from .merging import MergingCompressor
from .observe import GroupRecorder
from .scores import ScoreRecorder, value_gradient_scores
from .structure import (
    BUILDERS,
    build_groups,
    count_tokens,
    group_weights,
    nearest_centre_groups,
    normalise_scores,
    row_window_groups,
)
from .token_map import DenseTokenMap, TokenMap

__all__ = [
    'BUILDERS',
    'Compressor',
    'DenseTokenMap',
    'GroupRecorder',
    'MergingCompressor',
    'ScoreRecorder',
    'TokenCompressor',
    'TokenMap',
    'build_groups',
    'count_tokens',
    'group_weights',
    'nearest_centre_groups',
    'normalise_scores',
    'row_window_groups',
    'value_gradient_scores',
]
