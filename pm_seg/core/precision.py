"""Leaving autocast where rounding would change decisions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager:
    """No autocast inside, on the device of a tensor.

    Rounded similarities would pair other tokens than full ones. Entered only
    where there is autocast: exports trace it, and meta tensors know none.
    """
    device = x.device.type
    if device != 'meta' and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
