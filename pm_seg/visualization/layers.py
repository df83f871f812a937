"""What a compression leaves and costs, as data, text and figures."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from ..core import LayerLoad
from ..core.merging import Grid
from ..engine.scoring import compressible_modules
from .figures import depth_figure, panel_figure
from .panels import score_panels


@dataclass(frozen=True)
class ModuleReport:
    """A compressed module on an image of the native size.

    Attributes:
        num_tokens (int): Patch tokens, N.
        grid (tuple[int, int]): Their rows and columns.
        kind (str): How its tokens are compressed.
        layers (tuple[LayerLoad, ...]): What each layer works on, in order.
        layer_macs (float): Multiply-accumulates of a dense layer.
    """

    num_tokens: int
    grid: Grid
    kind: str
    layers: tuple[LayerLoad, ...]
    layer_macs: float

    @property
    def splits(self) -> bool:
        """Whether attention and MLP of a layer see different numbers."""
        return any(x.attended != x.kept for x in self.layers)

    @property
    def prunes(self) -> bool:
        """Whether a layer leaves tokens out."""
        return any(x.pruned for x in self.layers)

    @property
    def macs(self) -> float:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def dense_macs(self) -> float:
        """The same of the dense layers."""
        return len(self.layers) * self.layer_macs

    @property
    def share(self) -> float:
        """What is left of the dense layers' operations."""
        return self.macs / self.dense_macs


def module_reports(model: nn.Module) -> dict[str, ModuleReport]:
    """What each compressed module of the model works on and costs, by name."""
    reports = {}
    for name, module in compressible_modules(model).items():
        compressor, shape = module.compressor, module.compressor.shape
        reports[name or type(module).__name__] = ModuleReport(
            shape.num_tokens,
            shape.grid,
            compressor.extra_repr(),
            tuple(compressor.loads()),
            shape.dense_macs / shape.depth,
        )
    return reports


def describe(model: nn.Module) -> str:
    """A table of the tokens each layer works on, and what that costs.

    GMACs are for one image of the native size, finding groups, merging and
    restoring included.
    """
    lines = []
    for name, report in module_reports(model).items():
        height, width = report.grid
        lines.append(
            f'{name}: {report.num_tokens} patch tokens ({height}x{width})'
        )
        lines += wrap(
            report.kind, 79, initial_indent='  ', subsequent_indent='  '
        )
        lines += _table(report)
    return '\n'.join(lines)


def _table(report: ModuleReport) -> list[str]:
    between, pruned = report.splits, report.prunes
    head = '  layer  ' + 'attention  ' * between + 'tokens         '
    lines = [head + 'pruned  ' * pruned + ' GMACs  of dense']
    for index, layer in enumerate(report.layers):
        line = f'  {index:5d}  '
        line += f'{layer.attended:9d}  ' * between
        line += f'{layer.kept:6d}  {layer.kept / report.num_tokens:5.0%}  '
        line += f'{layer.pruned:6d}  ' * pruned
        line += f'{layer.macs / 1e9:6.3f}  '
        lines.append(line + f'{layer.macs / report.layer_macs:8.0%}')
    blank = ' ' * (15 + 11 * between + 8 * pruned)
    macs = f'{report.macs / 1e9:6.3f}  {report.share:8.1%}'
    return [*lines, f'    all  {blank}{macs}']


def module_scores(model: nn.Module) -> dict[str, np.ndarray]:
    """Scores (layers, h, w) of the modules whose structure has any."""
    return {
        name or type(module).__name__: module.compressor.scores.cpu()
        .view(-1, *module.compressor.shape.grid)
        .numpy()
        for name, module in compressible_modules(model).items()
        if module.compressor.needs_scores and module.compressor.has_scores
    }


def tokens_figure(model: nn.Module) -> Figure:
    """Patch tokens each layer works on, of a model with a structure."""
    kept = {
        name: [100 * x.kept / report.num_tokens for x in report.layers]
        for name, report in module_reports(model).items()
    }
    return depth_figure(kept, 'patch tokens kept, %', 100)


def structure_figures(model: nn.Module) -> dict[str, Figure]:
    """What does not depend on the image: 'tokens', and 'scores' if any.

    Args:
        model (BaseModel): With a structure, not wrapped.
    """
    figures = {'tokens': tokens_figure(model)}
    panels = score_panels(module_scores(model))
    if panels:
        figures['scores'] = panel_figure(panels, score_bar=True)
    return figures
