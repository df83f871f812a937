from statistics import median

from .flops import count_macs
from .progress import ProgressReporter, shown_progress
from .timing import time_interleaved

__all__ = [
    'ProgressReporter',
    'count_macs',
    'median',
    'shown_progress',
    'time_interleaved',
]
