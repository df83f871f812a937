"""Token compression of Vision Transformers in plain PyTorch.

Nothing in this package imports OpenMMLab: it serves any transformer. To read
the method, begin with :mod:`~pm_seg.core.progressive` (tokens merge over
depth and are restored at the end) and :mod:`~pm_seg.core.merging` (how).
"""

from .compressor import (
    Compressor,
    EncoderShape,
    GroupRecorder,
    Layer,
    LayerCost,
    LayerLoad,
    Outputs,
    run_dense,
)
from .importance import ImportanceFitter
from .merging import Merge, TokenGroups
from .presets import CLASSIFICATION, PRESETS, make_compressor
from .progressive import ProgressiveCompressor
from .scores import ScoreRecorder, value_gradient_scores
from .similarity import match, match_windows
from .static import StaticCompressor
from .structure import (
    count_tokens,
    group_weights,
    normalise_scores,
    row_window_groups,
)
from .token_map import DenseTokenMap, TokenMap

__all__ = [
    'CLASSIFICATION',
    'PRESETS',
    'Compressor',
    'DenseTokenMap',
    'EncoderShape',
    'GroupRecorder',
    'ImportanceFitter',
    'Layer',
    'LayerCost',
    'LayerLoad',
    'Merge',
    'Outputs',
    'ProgressiveCompressor',
    'ScoreRecorder',
    'StaticCompressor',
    'TokenGroups',
    'TokenMap',
    'count_tokens',
    'group_weights',
    'make_compressor',
    'match',
    'match_windows',
    'normalise_scores',
    'row_window_groups',
    'run_dense',
    'value_gradient_scores',
]
