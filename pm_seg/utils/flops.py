"""True multiply-accumulate counts, fused attention and merging included."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def _out_flops(x, *args, out_shape=None, **kwargs) -> int:
    """One multiply-accumulate for each value of an output of rows."""
    return 2 * prod(out_shape) if len(out_shape) > 1 else 0


def _add_flops(x, dim, index, source, *args, **kwargs) -> int:
    return 2 * prod(source)


_MERGE_FLOPS = {
    torch.ops.aten.index_select: _out_flops,
    torch.ops.aten.index_add: _add_flops,
    torch.ops.aten.index_add_: _add_flops,
}


@torch.no_grad()
def count_macs(function: Callable[[], object]) -> int:
    """Multiply-accumulates of one call, half of the FLOPs, as it runs.

    Matrix products and convolutions by torch's ``FlopCounterMode``; fused
    attention as its two products (other counters report 0 for it); merging
    and restoring one for each value that moves.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_MERGE_FLOPS)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops() // 2
