from statistics import median

from .flops import count_macs
from .progress import ProgressReporter, shown_progress
from .timing import keep_freed_memory, time_interleaved

__all__ = [
    'ProgressReporter',
    'count_macs',
    'keep_freed_memory',
    'median',
    'shown_progress',
    'time_interleaved',
]
