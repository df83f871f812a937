"""One HTML file on one compression: structure, costs, accuracy, pictures."""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from matplotlib import colormaps
from mmengine.model import BaseModel

from ..utils import median
from ..utils.files import whole_files
from ..version import __version__
from ..visualization import depth_figure, html, score_panels
from ..visualization.panels import SCORE_COLOURS
from .inspection import Inspection, module_scores
from .report import ModuleReport, module_reports

_PACKAGES = {
    'torch': ('torch',),
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv'),
    'mmsegmentation': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
}


@dataclass
class CompressionReport:
    """What :meth:`write` shows.

    Attributes:
        model (BaseModel): Compressed, not wrapped.
        title (str): Shown on top.
        facts (dict[str, str]): What was compressed, and how.
        macs (dict[str, int]): Of the whole 'dense' and 'compressed' model.
        seconds (dict[str, dict[str, list[float]]]): Times of one image,
            'dense' and 'compressed', by device.
        accuracy (dict[str, dict[str, float]]): Metrics of 'dense' and
            'compressed'; empty if not evaluated.
        inspections (list[Inspection]): Images to show.
        meta (dict): ``classes`` and ``palette`` of the dataset.
    """

    model: BaseModel
    title: str
    facts: dict[str, str]
    macs: dict[str, int]
    seconds: dict[str, dict[str, list[float]]]
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    inspections: list[Inspection] = field(default_factory=list)
    meta: dict = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Write the page."""
        with whole_files(Path(path)) as (partial,):
            partial.write_text(self.to_html(), encoding='utf-8')

    def to_html(self) -> str:
        """The page: no script, no other file, nothing from the network."""
        reports = module_reports(self.model)
        size = 'x'.join(map(str, _native_size(self.model)))
        return html.page(
            self.title,
            [
                f'<h1>{escape(self.title)}</h1>',
                '<p class="note">Dense is the same model with compression '
                f'off. Costs and times are for one image of {size}.</p>',
                html.cards(self._cards()),
                '<h2>What was compressed</h2>',
                html.facts({**self.facts, 'versions': versions()}),
                *self._structure(reports),
                *self._speed(),
                *self._accuracy(),
                *self._pictures(),
                *self._scores(),
            ],
        )

    def _cards(self) -> dict[str, tuple[str, str]]:
        dense, compressed = self.macs['dense'], self.macs['compressed']
        cards = {
            'GMACs': (
                f'{compressed / dense:.0%}',
                f'{dense / 1e9:.2f} → {compressed / 1e9:.2f}',
            )
        }
        for device, seconds in self.seconds.items():
            before, after = (
                1e3 * median(seconds[name]) for name in ('dense', 'compressed')
            )
            cards[f'speed, {device}'] = (
                f'{before / after:.2f}x',
                f'{before:.1f} → {after:.1f} ms',
            )
        for name, value in self.accuracy.get('dense', {}).items():
            after = self.accuracy['compressed'][name]
            cards[name] = (f'{after:.2f}', f'{value:.2f} dense')
        return cards

    def _structure(self, reports: Mapping[str, ModuleReport]) -> list[str]:
        kept = {
            name: [100 * x.kept / report.num_tokens for x in report.layers]
            for name, report in reports.items()
        }
        return [
            '<h2>Structure and costs</h2>',
            '<p>Patch tokens each layer works on, and its '
            'multiply-accumulates with finding groups, merging and '
            'restoring.</p>',
            html.chart(
                depth_figure(kept, 'patch tokens kept, %', 100),
                'Share of the patch tokens kept, by layer',
            ),
            *(
                part
                for name, report in reports.items()
                for part in _module_table(name, report)
            ),
        ]

    def _speed(self) -> list[str]:
        rows = []
        for device, seconds in self.seconds.items():
            base = median(seconds['dense'])
            for name, times in seconds.items():
                low, _, high = statistics.quantiles(times, n=4)
                rows.append(
                    (
                        escape(f'{device}, {name}'),
                        f'{1e3 * median(times):.1f}',
                        f'{500 * (high - low):.1f}',
                        f'{base / median(times):.2f}x',
                    )
                )
        rounds = len(next(iter(next(iter(self.seconds.values())).values())))
        return [
            '<h2>Speed</h2>',
            f'<p>Eager PyTorch, fp32, batch 1; medians of {rounds} rounds, '
            'dense and compressed in turns. +- is half of the distance '
            'between the quartiles.</p>',
            html.table(('', 'ms per image', '+-', 'speed'), rows),
        ]

    def _accuracy(self) -> list[str]:
        head = '<h2>Accuracy</h2>'
        if not self.accuracy:
            return [
                head,
                '<p>Not measured: --evaluate was not given.</p>',
            ]
        rows = [
            (
                escape(name),
                f'{before:.2f}',
                f'{self.accuracy["compressed"][name]:.2f}',
                f'{self.accuracy["compressed"][name] - before:+.2f}',
            )
            for name, before in self.accuracy['dense'].items()
        ]
        return [
            head,
            '<p>On the validation data, straight after compression, without '
            'fine-tuning.</p>',
            html.table(('', 'dense', 'compressed', 'change'), rows),
        ]

    def _pictures(self) -> list[str]:
        parts = ['<h2>Pictures</h2>']
        if not self.inspections:
            return [*parts, '<p>There were no images to draw.</p>']
        for number, one in enumerate(self.inspections):
            panels = one.prediction_panels(self.meta)
            parts += [
                f'<h3>{escape(one.name)}</h3>',
                html.panels(panels, large=True),
            ]
            if one.classifies:
                parts.append(_ranking(one, self.meta))
            else:
                parts += [
                    html.legend(one.legend(self.meta), 'Classes:'),
                    html.legend(one.changes, 'Differences:'),
                ]
            parts += [
                f'<details{" open" if number == 0 else ""}>'
                '<summary>Token groups, layer by layer</summary>'
                '<p class="note">Each group in its mean colour, outlined; '
                'pruned tokens are dark.</p>',
                html.panels(one.group_panels()),
                '</details>',
            ]
        return parts

    def _scores(self) -> list[str]:
        panels = score_panels(module_scores(self.model))
        if not panels:
            return []
        return [
            '<h2>Scores</h2>',
            '<p>How much the loss depends on each patch position, layer by '
            'layer; groups are smaller where scores are high.</p>',
            html.colour_scale(
                colormaps[SCORE_COLOURS]([0.0, 0.25, 0.5, 0.75, 1.0]),
                '0',
                '99th percentile of the layer',
            ),
            html.panels(panels, pixels=True),
        ]


def _native_size(model: BaseModel) -> tuple[int, ...]:
    size = model.backbone.img_size
    return (size, size) if isinstance(size, int) else tuple(size)


def versions() -> str:
    """Versions of what has a say in the numbers."""
    found = [f'pm_seg {__version__}']
    for name, candidates in _PACKAGES.items():
        for candidate in candidates:
            try:
                found.append(f'{name} {version(candidate)}')
                break
            except PackageNotFoundError:
                pass
    return ', '.join([*found, f'Python {platform.python_version()}'])


def machine() -> str:
    """The processor and how many threads torch uses of it."""
    name = platform.processor() or platform.machine()
    info = Path('/proc/cpuinfo')
    if info.is_file():
        found = re.search(r'^model name\s*: (.+)$', info.read_text(), re.M)
        name = found[1] if found else name
    threads = torch.get_num_threads()
    return f'CPU ({name}, {threads} thread{"s" if threads > 1 else ""})'


def _module_table(name: str, report: ModuleReport) -> list[str]:
    height, width = report.grid
    between = any(x.attended != x.kept for x in report.layers)
    pruned = any(x.pruned for x in report.layers)
    heads = ['layer', *['attention', 'MLP'][not between :]]
    heads += ['pruned'] * pruned
    heads += ['tokens', 'GMACs', 'of dense']
    rows = []
    for index, x in enumerate(report.layers):
        row = [str(index), *[str(x.attended), str(x.kept)][not between :]]
        row += [str(x.pruned)] * pruned
        row.append(html.share_bar(x.kept / report.num_tokens))
        rows.append([*row, *_costs(x.macs, report.layer_macs)])
    blank = [''] * (len(heads) - 3)
    rows.append(['all', *blank, *_costs(report.macs, report.dense_macs)])
    return [
        f'<h3>{escape(name)}</h3>',
        f'<p>{report.num_tokens} patch tokens ({height}x{width}); '
        f'{escape(report.kind)}</p>',
        html.table(heads, rows, total=True),
    ]


def _costs(macs: float, dense: float) -> tuple[str, str]:
    return f'{macs / 1e9:.3f}', html.share_bar(macs / dense)


def _ranking(inspection: Inspection, meta: dict) -> str:
    rows: Sequence[tuple[str, str, str]] = [
        (escape(name), html.share_bar(dense), html.share_bar(compressed))
        for name, dense, compressed in inspection.ranking(meta)
    ]
    return html.table(('class', 'dense', 'compressed'), rows)
