"""What a compression leaves and costs, as text."""

from __future__ import annotations

from torch import nn

from ..core import Compressor, MergingCompressor, TokenCompressor
from ..core.budget import LEVELS
from ..models.layers import layer_cost
from .scoring import compressible_modules


def layer_macs(layer: nn.Module, tokens: int) -> int:
    """Multiply-accumulates of a transformer layer on so many tokens."""
    linear, quadratic = layer_cost(layer)
    return linear * tokens + quadratic * tokens**2


def describe(model: nn.Module) -> str:
    """A table of the tokens each layer works on, and what that costs.

    GMACs are for one image of the native size, merge, restore and shortcut
    included.
    """
    lines = []
    for name, module in compressible_modules(model).items():
        describe_one = (
            _describe_maps
            if isinstance(module.compressor, TokenCompressor)
            else _describe_merging
        )
        lines += [_title(name or type(module).__name__, module.compressor)]
        lines += describe_one(module)
    return '\n'.join(lines)


def _title(name: str, compressor: Compressor) -> str:
    height, width = compressor.grid
    kind = (
        f'restore {compressor.mode!r}'
        if isinstance(compressor, TokenCompressor)
        else f'method {compressor.method!r}'
    )
    size = f'{compressor.num_tokens} patch tokens ({height}x{width})'
    return f'{name}: {size}, {kind}'


def _describe_merging(module: nn.Module) -> list[str]:
    compressor: MergingCompressor = module.compressor
    before, lines = compressor.num_tokens, ['  layer  attention  MLP']
    for index, after in enumerate(compressor.tokens_after(compressor.grid)):
        lines.append(f'  {index:5d}  {before:9d}  {after:5d}')
        before = after
    return lines


def _describe_maps(module: nn.Module) -> list[str]:
    compressor: TokenCompressor = module.compressor
    prefix, total = compressor.num_prefix, compressor.num_tokens
    measured = bool((compressor.losses > 0).any())
    head = '  layer  groups  pruned  tokens  GMACs   of dense'
    lines = [head + ('  loss at 50 % alone' if measured else '')]
    groups, pruned = compressor.num_groups, compressor.num_pruned
    firsts = {layers[0] for layers in compressor.spans}
    cost = dense = 0
    for index, layer in enumerate(module.layers):
        slots = prefix + groups[index]
        macs = layer_macs(layer, slots)
        full = layer_macs(layer, prefix + total)
        mapped = groups[index] < total or compressor.matrices == 'dense'
        note = ''
        if index not in firsts and index in compressor.layers:
            note = '  (map of the layer before)'
        elif index not in compressor.layers or not mapped:
            note = '  (dense)'
        else:
            macs += compressor.map_macs(groups[index])
        loss = compressor.losses[index, LEVELS.index(0.5)].item()
        lines.append(
            f'  {index:5d}  {groups[index]:6d}  {pruned[index]:6d}  '
            f'{groups[index] / total:6.0%}  {macs / 1e9:6.3f}  '
            f'{macs / full:7.0%}'
            + (f'  {loss:8.5f}' if measured and index in firsts else '')
            + note
        )
        cost, dense = cost + macs, dense + full
    lines.append(f'    all{"":24}{cost / 1e9:6.3f}  {cost / dense:7.0%}')
    return lines
