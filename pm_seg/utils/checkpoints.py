"""Loading checkpoints without running code from them."""

from __future__ import annotations

import codecs
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer


def _history_method(owner: type, name: str) -> object:
    """Stands in for ``getattr``, for the one class that needs it."""
    if owner is not HistoryBuffer:
        raise UnpicklingError(f'refusing to read {name!r} of {owner!r}')
    return getattr(owner, name)


# Allowed under the name of what it stands in for; torch before 2.6 takes no
# other name than a function's own.
_history_method.__module__ = 'builtins'
_history_method.__name__ = _history_method.__qualname__ = 'getattr'


def allow_training_state() -> None:
    """Let weights-only loading read what mmengine saves for resuming.

    Since torch 2.6 ``torch.load`` reads weights only, and mmengine 0.10.7
    cannot resume: its checkpoints hold logged scalars as ``HistoryBuffer``
    with numpy arrays. These few types are allowed; code is still refused.
    """
    core = np._core if hasattr(np, '_core') else np.core
    multiarray = core.multiarray
    types: list = [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        multiarray._reconstruct,
        multiarray.scalar,
        codecs.encode,  # bytes, in pickles of protocol 2; torch < 2.5
    ]
    types += [
        type(np.dtype(kind))
        for kind in (np.float32, np.float64, np.int32, np.int64, np.uint32)
    ]
    types.append(_history_method)
    torch.serialization.add_safe_globals(types)


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU, training state included, no code.

    Args:
        path (str | Path): A file written by a training run or by
            ``tools/compress.py``.

    Raises:
        UnpicklingError: If it holds anything but data.
    """
    # Anew each time: leaving a ``safe_globals`` block, as the maintained
    # mmengine does after every load, drops what was allowed before it.
    allow_training_state()
    return torch.load(path, map_location='cpu', weights_only=True)
