from .flops import count_macs
from .progress import ProgressReporter, shown_progress
from .timing import median, time_interleaved

__all__ = [
    'ProgressReporter',
    'count_macs',
    'median',
    'shown_progress',
    'time_interleaved',
]
