"""What a compression leaves and costs, as data, text and figures."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent, wrap

from matplotlib.figure import Figure
from torch import nn

from ..core import EncoderShape, LayerLoad
from ..engine.scoring import compressible_modules
from .figures import depth_figure, panel_figure
from .panels import Panel, score_panels


@dataclass(frozen=True)
class ModuleReport:
    """A compressed module on an image of the native size.

    Attributes:
        shape (EncoderShape): What is compressed.
        kind (str): How.
        layers (list[LayerLoad]): What each layer works on, in order.
    """

    shape: EncoderShape
    kind: str
    layers: list[LayerLoad]

    @property
    def splits(self) -> bool:
        """Whether attention and MLP of a layer see different numbers."""
        return any(x.attended != x.kept for x in self.layers)

    @property
    def prunes(self) -> bool:
        """Whether a layer leaves tokens out."""
        return any(x.pruned for x in self.layers)

    @property
    def layer_macs(self) -> float:
        """Multiply-accumulates of a dense layer."""
        return self.shape.dense_macs / self.shape.depth

    @property
    def macs(self) -> float:
        """Multiply-accumulates of all layers."""
        return sum(layer.macs for layer in self.layers)

    @property
    def share(self) -> float:
        """What is left of the dense layers' operations."""
        return self.macs / self.shape.dense_macs


def module_reports(model: nn.Module) -> dict[str, ModuleReport]:
    """What each compressed module of the model works on and costs, by name."""
    return {
        name or type(module).__name__: ModuleReport(
            module.compressor.shape,
            module.compressor.extra_repr(),
            module.compressor.loads(),
        )
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
        lines += [indent(line, '  ') for line in wrap(report.kind, 77)]
        lines += _table(report)
    return '\n'.join(lines)


def _table(report: ModuleReport) -> list[str]:
    between, pruned = report.splits, report.prunes
    attention, out = 'attention  ' * between, 'pruned  ' * pruned
    lines = [f'  layer  {attention}tokens         {out} GMACs  of dense']
    for index, layer in enumerate(report.layers):
        kept = layer.kept / report.shape.num_tokens
        attention = f'{layer.attended:9d}  ' * between
        out = f'{layer.pruned:6d}  ' * pruned
        share = layer.macs / report.layer_macs
        lines.append(
            f'  {index:5d}  {attention}{layer.kept:6d}  {kept:5.0%}  {out}'
            f'{layer.macs / 1e9:6.3f}  {share:8.0%}'
        )
    blank = ' ' * (15 + len(attention) + len(out))
    macs = f'{report.macs / 1e9:6.3f}  {report.share:8.1%}'
    return [*lines, f'    all  {blank}{macs}']


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
    """What does not depend on the image: 'tokens', and 'scores' if any.

    Args:
        model (BaseModel): With a structure.
    """
    figures = {'tokens': tokens_figure(model)}
    panels = model_score_panels(model)
    if panels:
        figures['scores'] = panel_figure(panels, score_bar=True)
    return figures
