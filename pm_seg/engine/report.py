"""What a compression leaves and costs, as data and as text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..core import Compressor, MergingCompressor, TokenCompressor
from ..core.budget import LEVELS
from ..core.structure import Grid
from ..models.layers import layer_cost
from .scoring import compressible_modules


@dataclass(frozen=True)
class LayerReport:
    """One layer on an image of the native size.

    Attributes:
        attended (int): Patch tokens its attention works on.
        groups (int): Patch tokens its MLP works on; the same but for merging
            between the two.
        pruned (int): Patch tokens that bypass it.
        macs (int): Multiply-accumulates, merge and restore included.
        dense_macs (int): The same of the dense layer.
        loss (float, optional): Measured loss with this layer alone at 50 %
            of its tokens.
        note (str): What is special about it.
    """

    attended: int
    groups: int
    pruned: int
    macs: int
    dense_macs: int
    loss: float | None = None
    note: str = ''


@dataclass(frozen=True)
class ModuleReport:
    """A compressed module on an image of the native size.

    Attributes:
        num_tokens (int): Patch tokens, N.
        grid (tuple[int, int]): Their rows and columns.
        kind (str): How its tokens are compressed.
        layers (tuple[LayerReport, ...]): In order.
    """

    num_tokens: int
    grid: Grid
    kind: str
    layers: tuple[LayerReport, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def dense_macs(self) -> int:
        """The same of the dense layers."""
        return sum(layer.dense_macs for layer in self.layers)


def layer_macs(layer: nn.Module, tokens: int) -> int:
    """Multiply-accumulates of a transformer layer on so many tokens."""
    linear, quadratic = layer_cost(layer)
    return linear * tokens + quadratic * tokens**2


def module_reports(model: nn.Module) -> dict[str, ModuleReport]:
    """What each compressed module of the model works on and costs, by name."""
    reports = {}
    for name, module in compressible_modules(model).items():
        compressor: Compressor = module.compressor
        if isinstance(compressor, TokenCompressor):
            kind, layers = f'restore {compressor.mode!r}', _map_layers(module)
        else:
            kind = f'method {compressor.method!r}'
            layers = _merging_layers(module)
        reports[name or type(module).__name__] = ModuleReport(
            compressor.num_tokens, compressor.grid, kind, tuple(layers)
        )
    return reports


def _map_layers(module: nn.Module) -> list[LayerReport]:
    compressor: TokenCompressor = module.compressor
    prefix, total = compressor.num_prefix, compressor.num_tokens
    groups, pruned = compressor.num_groups, compressor.num_pruned
    firsts = {layers[0] for layers in compressor.spans}
    reports = []
    for index, layer in enumerate(module.layers):
        slots = prefix + groups[index]
        macs, note = layer_macs(layer, slots), ''
        mapped = groups[index] < total or compressor.matrices == 'dense'
        if index not in firsts and index in compressor.layers:
            note = 'map of the layer before'
        elif index not in compressor.layers or not mapped:
            note = 'dense'
        else:
            macs += compressor.map_macs(groups[index])
        loss = None
        if compressor.has_losses and index in firsts:
            loss = compressor.losses[index, LEVELS.index(0.5)].item()
        reports.append(
            LayerReport(
                groups[index],
                groups[index],
                pruned[index],
                macs,
                layer_macs(layer, prefix + total),
                loss,
                note,
            )
        )
    return reports


def _merging_layers(module: nn.Module) -> list[LayerReport]:
    """Attention on the tokens before a layer's merge, the MLP after it."""
    compressor: MergingCompressor = module.compressor
    prefix, total, dims = (
        compressor.num_prefix,
        compressor.num_tokens,
        compressor.dims,
    )
    before, reports = total, []
    for index, (layer, after) in enumerate(
        zip(module.layers, compressor.tokens_after(compressor.grid))
    ):
        weights, quadratic = layer_cost(layer)
        attention = sum(
            p.numel() for p in layer.attn.parameters() if p.dim() == 2
        )
        macs = attention * (prefix + before)
        macs += quadratic * (prefix + before) ** 2
        macs += (weights - attention) * (prefix + after)
        if after < before:
            macs += before * dims  # averaging
            if compressor.method == 'tome':
                dims_compared = dims // layer.attn.num_heads
                macs += (before // 2) ** 2 * dims_compared
            elif index:
                macs += (before // 2) ** 2 * dims
        if index == compressor.depth - 1:
            macs += total * dims  # every patch gets its token back
        reports.append(
            LayerReport(
                before, after, 0, macs, layer_macs(layer, prefix + total)
            )
        )
        before = after
    return reports


def describe(model: nn.Module) -> str:
    """A table of the tokens each layer works on, and what that costs.

    GMACs are for one image of the native size, merge, restore and shortcut
    included.
    """
    lines = []
    for name, report in module_reports(model).items():
        height, width = report.grid
        lines.append(
            f'{name}: {report.num_tokens} patch tokens ({height}x{width}), '
            f'{report.kind}'
        )
        merging = any(x.attended != x.groups for x in report.layers)
        lines += _merging_table(report) if merging else _map_table(report)
    return '\n'.join(lines)


def _merging_table(report: ModuleReport) -> list[str]:
    lines = ['  layer  attention     MLP  tokens  GMACs   of dense']
    for index, layer in enumerate(report.layers):
        lines.append(
            f'  {index:5d}  {layer.attended:9d}  {layer.groups:6d}  '
            f'{layer.groups / report.num_tokens:6.0%}  {_costs(layer)}'
        )
    return [*lines, f'    all{"":27}{_costs(report)}']


def _map_table(report: ModuleReport) -> list[str]:
    measured = any(layer.loss is not None for layer in report.layers)
    head = '  layer  groups  pruned  tokens  GMACs   of dense'
    lines = [head + ('  loss at 50 % alone' if measured else '')]
    for index, layer in enumerate(report.layers):
        lines.append(
            f'  {index:5d}  {layer.groups:6d}  {layer.pruned:6d}  '
            f'{layer.groups / report.num_tokens:6.0%}  {_costs(layer)}'
            + (f'  {layer.loss:8.5f}' if layer.loss is not None else '')
            + (f'  ({layer.note})' if layer.note else '')
        )
    return [*lines, f'    all{"":24}{_costs(report)}']


def _costs(part: LayerReport | ModuleReport) -> str:
    return f'{part.macs / 1e9:6.3f}  {part.macs / part.dense_macs:7.0%}'
