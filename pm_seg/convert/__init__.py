"""Checkpoints of other code bases as checkpoints of pm_seg.

Each converter is a function of a state dict and of :class:`Hints` about what
weights do not say, and returns :class:`Converted`: a state dict with our keys
and the config of the model that loads it. What cannot be converted raises
``pm_seg.utils.checkpoints.CheckpointError``.
"""

from collections.abc import Callable

from torch import Tensor

from .prune_merge import convert_pm_segmenter, convert_pm_vit
from .results import Converted, write_converted
from .segmenter import convert_segmenter
from .sources import Hints, read_source
from .timm import convert_timm

#: What ``tools/convert_checkpoint.py`` can read.
CONVERTERS: dict[str, Callable[[dict[str, Tensor], Hints], Converted]] = {
    'timm': convert_timm,
    'segmenter': convert_segmenter,
    'pm-vit': convert_pm_vit,
    'pm-segmenter': convert_pm_segmenter,
}

__all__ = [
    'CONVERTERS',
    'Converted',
    'Hints',
    'convert_pm_segmenter',
    'convert_pm_vit',
    'convert_segmenter',
    'convert_timm',
    'read_source',
    'write_converted',
]
