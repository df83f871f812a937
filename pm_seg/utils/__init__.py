from .flops import count_macs
from .progress import ProgressReporter
from .timing import median, time_interleaved

__all__ = ['ProgressReporter', 'count_macs', 'median', 'time_interleaved']
