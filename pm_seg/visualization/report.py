"""One HTML file on one compression: structure, costs, accuracy, pictures."""

from __future__ import annotations

import base64
import statistics
from dataclasses import dataclass
from pathlib import Path
from platform import python_version

import cv2
import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from mmengine.model import BaseModel
from mmengine.utils import to_2tuple

from ..env import processor
from ..stacks import installed_stacks
from ..utils.files import whole_files
from ..version import __version__
from .figures import to_svg
from .inspection import Inspection
from .layers import model_score_panels, module_reports, tokens_figure
from .panels import BLUE, SCORE_COLOURS


def png_uri(image: np.ndarray) -> str:
    """An RGB image, uint8, (H, W, 3), as the address of an ``<img>``."""
    _, data = cv2.imencode('.png', np.ascontiguousarray(image[..., ::-1]))
    return f'data:image/png;base64,{base64.b64encode(data).decode()}'


def _svg_uri(figure: Figure) -> str:
    data = base64.b64encode(to_svg(figure).encode()).decode()
    return f'data:image/svg+xml;base64,{data}'


_PAGES = Environment(
    loader=PackageLoader('pm_seg', 'visualization'),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_PAGES.filters.update(png=png_uri, svg=_svg_uri, hex=to_hex)


@dataclass
class CompressionReport:
    """What :meth:`write` shows; what is by name is 'dense' and 'compressed'.

    Attributes:
        model (BaseModel): Compressed, not wrapped.
        title (str): Shown on top.
        facts (dict[str, str]): What was compressed, and how.
        macs (dict[str, int]): Of the whole model, by name.
        seconds (dict[str, dict[str, list[float]]]): Of one image, by device
            and name.
        accuracy (dict[str, dict[str, float]]): Metrics by name; may be empty.
        inspections (list[Inspection]): Images to show.
        meta (dict): ``classes`` and ``palette`` of the dataset.
    """

    model: BaseModel
    title: str
    facts: dict[str, str]
    macs: dict[str, int]
    seconds: dict[str, dict[str, list[float]]]
    accuracy: dict[str, dict[str, float]]
    inspections: list[Inspection]
    meta: dict

    def write(self, path: str | Path) -> None:
        """Write the page."""
        with whole_files(Path(path)) as (partial,):
            partial.write_text(self.to_html(), encoding='utf-8')

    def to_html(self) -> str:
        """The page: no script, no other file, nothing from the network."""
        return _PAGES.get_template('report.html.jinja').render(
            report=self,
            blue=BLUE,
            size='x'.join(map(str, to_2tuple(self.model.backbone.img_size))),
            facts={**self.facts, 'versions': versions()},
            tokens=tokens_figure(self.model),
            modules=module_reports(self.model),
            speeds={
                device: {name: _timing(times[name]) for name in times}
                for device, times in self.seconds.items()
            },
            rounds=len(next(iter(self.seconds.values()))['dense']),
            scores=model_score_panels(self.model),
            scale=list(colormaps[SCORE_COLOURS]([0.0, 0.25, 0.5, 0.75, 1.0])),
        )


def _timing(seconds: list[float]) -> tuple[float, float]:
    """Median and half the distance between the quartiles, milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return 1e3 * middle, 500 * (high - low)


def versions() -> str:
    """Versions of what has a say in the numbers."""
    found = {'pm_seg': __version__, 'torch': torch.__version__}
    found |= {**installed_stacks().versions, 'Python': python_version()}
    return ', '.join(f'{name} {number}' for name, number in found.items())


def machine() -> str:
    """The processor and how many threads torch uses of it."""
    threads = torch.get_num_threads()
    many = 's' if threads > 1 else ''
    return f'CPU ({processor()}, {threads} thread{many})'
