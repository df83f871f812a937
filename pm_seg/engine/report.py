"""What a compression leaves and costs, as text."""

from __future__ import annotations

from torch import nn

from ..core import TokenCompressor
from .scoring import compressible_modules


def layer_macs(layer: nn.Module, tokens: int) -> int:
    """Multiply-accumulates of a transformer layer on so many tokens.

    Every weight matrix once per token, and the two products of attention,
    ``2 T^2 C``.
    """
    weights = sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    return weights * tokens + 2 * tokens**2 * layer.attn.embed_dims


def token_map_macs(compressor: TokenCompressor, slots: int, dims: int) -> int:
    """Multiply-accumulates of merge, restore and shortcut."""
    tokens = compressor.num_prefix + compressor.num_tokens
    passes = 3 if compressor.mode == 'residual' else 2
    if compressor.matrices == 'dense':
        return passes * slots * tokens * dims
    return passes * tokens * dims


def describe(model: nn.Module) -> str:
    """A table of the tokens each layer works on, and what that costs.

    GMACs are for one image of the native size, merge, restore and shortcut
    included.
    """
    lines = []
    for name, module in compressible_modules(model).items():
        lines += _describe_module(name or type(module).__name__, module)
    return '\n'.join(lines)


def _describe_module(name: str, module: nn.Module) -> list[str]:
    compressor = module.compressor
    height, width = compressor.grid
    prefix, total = compressor.num_prefix, compressor.num_tokens
    lines = [
        f'{name}: {total} patch tokens ({height}x{width}), '
        f'restore {compressor.mode!r}',
        '  layer  groups  pruned  tokens  GMACs   of dense',
    ]
    groups, pruned = compressor.num_groups, compressor.num_pruned
    firsts = {layers[0] for layers in compressor.spans}
    cost = dense = 0
    for index, layer in enumerate(module.layers):
        slots = prefix + groups[index]
        macs = layer_macs(layer, slots)
        if index in firsts:
            dims = layer.attn.embed_dims
            macs += token_map_macs(compressor, slots, dims)
        full = layer_macs(layer, prefix + total)
        if index in firsts:
            note = ''
        elif index in compressor.layers:
            note = '  (map of the layer before)'
        else:
            note = '  (dense)'
        lines.append(
            f'  {index:5d}  {groups[index]:6d}  {pruned[index]:6d}  '
            f'{groups[index] / total:6.0%}  {macs / 1e9:6.3f}  '
            f'{macs / full:7.0%}{note}'
        )
        cost, dense = cost + macs, dense + full
    lines.append(f'    all{"":24}{cost / 1e9:6.3f}  {cost / dense:7.0%}')
    return lines
