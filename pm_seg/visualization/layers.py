"""What a compression leaves and costs, as data, text and figures."""

from __future__ import annotations

from textwrap import wrap

from matplotlib.figure import Figure
from torch import nn

from ..core import Compressor
from ..engine.scoring import compressible_modules
from .figures import depth_figure, panel_figure
from .panels import Panel, score_panels


class ModuleReport:
    """A compressed module on an image of the native size.

    Attributes:
        shape (EncoderShape): What is compressed; ``kind`` says how.
        layers (list[LayerLoad]): What each layer works on, in order.
        splits (bool): Whether attention and MLP of a layer see different
            numbers; ``prunes`` whether a layer leaves tokens out.
        macs (float): Multiply-accumulates of all layers, ``share`` of the
            dense layers', which have ``layer_macs`` each.
    """

    def __init__(self, compressor: Compressor) -> None:
        self.shape = compressor.shape
        self.kind = compressor.extra_repr()
        self.layers = compressor.loads()
        self.splits = any(x.attended != x.kept for x in self.layers)
        self.prunes = any(x.pruned for x in self.layers)
        self.layer_macs = self.shape.dense_macs / self.shape.depth
        self.macs = sum(layer.macs for layer in self.layers)
        self.share = self.macs / self.shape.dense_macs


def module_reports(model: nn.Module) -> dict[str, ModuleReport]:
    """What each compressed module of the model works on and costs, by name."""
    return {
        name or type(module).__name__: ModuleReport(module.compressor)
        for name, module in compressible_modules(model).items()
    }


def describe(model: nn.Module) -> str:
    """A table of the tokens each layer works on, and what that costs.

    GMACs are for one image of the native size, finding groups, merging and
    restoring included.
    """
    lines = []
    for name, report in module_reports(model).items():
        tokens, (height, width) = report.shape.num_tokens, report.shape.grid
        lines.append(f'{name}: {tokens} patch tokens ({height}x{width})')
        lines += [f'  {line}' for line in wrap(report.kind, 77)]
        attention = 'attention  ' * report.splits
        out = 'pruned  ' * report.prunes
        lines.append(
            f'  layer  {attention}tokens         {out} GMACs  of dense'
        )
        for index, layer in enumerate(report.layers):
            attention = f'{layer.attended:9d}  ' * report.splits
            out = f'{layer.pruned:6d}  ' * report.prunes
            lines.append(
                f'  {index:5d}  {attention}{layer.kept:6d}  '
                f'{layer.kept / tokens:5.0%}  {out}{layer.macs / 1e9:6.3f}  '
                f'{layer.macs / report.layer_macs:8.0%}'
            )
        blank = ' ' * (15 + len(attention) + len(out))
        macs = f'{report.macs / 1e9:6.3f}  {report.share:8.1%}'
        lines.append(f'    all  {blank}{macs}')
    return '\n'.join(lines)


def model_score_panels(model: nn.Module) -> list[Panel]:
    """Scores of the modules whose structure comes from any."""
    scores = {}
    for name, module in compressible_modules(model).items():
        compressor = module.compressor
        if compressor.needs_scores and compressor.has_scores:
            maps = compressor.scores.cpu().unflatten(1, compressor.shape.grid)
            scores[name or type(module).__name__] = maps.numpy()
    return score_panels(scores)


def tokens_figure(model: nn.Module) -> Figure:
    """Patch tokens each layer works on, of a model with a structure."""
    kept = {
        name: [100 * x.kept / report.shape.num_tokens for x in report.layers]
        for name, report in module_reports(model).items()
    }
    return depth_figure(kept, 'patch tokens kept, %', 100)


def structure_figures(model: nn.Module) -> dict[str, Figure]:
    """What does not depend on the image: 'tokens', and 'scores' if any."""
    figures = {'tokens': tokens_figure(model)}
    panels = model_score_panels(model)
    if panels:
        figures['scores'] = panel_figure(panels, score_bar=True)
    return figures
