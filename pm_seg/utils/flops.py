"""True multiply-accumulate counts, fused attention and token maps included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..core.segments import counted_as_sums

_ATEN = torch.ops.aten


def _gather_flops(x, *args, out_shape=None, **kwargs) -> int:
    """One multiply-accumulate for each merged or restored value."""
    return 2 * _numel(out_shape) if len(out_shape) > 1 else 0


def _scatter_flops(x, dim, index, source, *args, **kwargs) -> int:
    return 2 * _numel(source)


def _bag_flops(rows, index, *args, **kwargs) -> int:
    return 2 * _numel(index) * rows[1]


def _count_flops(x, *args, **kwargs) -> int:
    return 2 * _numel(x)


def _numel(shape) -> int:
    return int(torch.Size(shape).numel())


_TOKEN_MAP_FLOPS = {
    _ATEN.index_select: _gather_flops,
    _ATEN.gather: _gather_flops,
    _ATEN._embedding_bag: _bag_flops,
    _ATEN._embedding_bag_forward_only: _bag_flops,
    _ATEN.scatter_add: _scatter_flops,
    _ATEN.bincount: _count_flops,
}


@torch.no_grad()
def count_macs(function: Callable[[], object]) -> int:
    """Multiply-accumulates of one call.

    Matrix products and convolutions by torch's ``FlopCounterMode``; fused
    attention as its two products (other counters report 0 for it); merge,
    restore and shortcut one for each value touched.

    Args:
        function (Callable): For example ``lambda: model(images)``.

    Returns:
        int: MACs, half of the FLOPs.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_TOKEN_MAP_FLOPS)
    with sdpa_kernel(SDPBackend.MATH), counted_as_sums(), counter:
        function()
    return counter.get_total_flops() // 2
