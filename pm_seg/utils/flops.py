"""True multiply-accumulate counts, fused attention and merging included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_ATEN = torch.ops.aten


def _out_flops(x, *args, out_shape=None, **kwargs) -> int:
    """One multiply-accumulate for each value of an output of rows."""
    return 2 * _numel(out_shape) if len(out_shape) > 1 else 0


def _add_flops(x, dim, index, source, *args, **kwargs) -> int:
    return 2 * _numel(source)


def _numel(shape) -> int:
    return int(torch.Size(shape).numel())


_MERGE_FLOPS = {
    _ATEN.index_select: _out_flops,
    _ATEN.index_add: _add_flops,
    _ATEN.index_add_: _add_flops,
}


@torch.no_grad()
def count_macs(function: Callable[[], object]) -> int:
    """Multiply-accumulates of one call, as it runs.

    Matrix products and convolutions by torch's ``FlopCounterMode``; fused
    attention as its two products (other counters report 0 for it); merging
    and restoring one for each value that moves.

    Args:
        function (Callable): For example ``lambda: model(images)``.

    Returns:
        int: MACs, half of the FLOPs.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_MERGE_FLOPS)
    with sdpa_kernel(SDPBackend.MATH), counter:
        function()
    return counter.get_total_flops() // 2
