"""Autocast, and leaving it where rounding would change decisions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def in_autocast(x: Tensor) -> bool:
    """Whether there is autocast on the device of a tensor."""
    device = x.device.type
    return device != 'meta' and torch.is_autocast_enabled(device)


def full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast inside. Entered only where there is one: exports trace it.

    Rounded similarities would pair other tokens than full ones.
    """
    if in_autocast(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()
