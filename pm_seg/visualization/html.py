"""Parts of an HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

import cv2
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from .figures import to_svg
from .panels import BLUE, Panel

_STYLE = """
:root { color: #1a1a1a; background: #fff; }
body { font: 16px/1.5 system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif;
  max-width: 1180px; margin: 0 auto; padding: 16px 20px 48px; }
h1 { font-size: 28px; line-height: 1.2; margin: 12px 0 4px; }
h2 { font-size: 21px; margin: 40px 0 8px; padding-top: 12px;
  border-top: 1px solid #c8c8c8; }
h3 { font-size: 17px; margin: 24px 0 6px; }
p { margin: 6px 0 10px; max-width: 75ch; }
.note { color: #4a4a4a; font-size: 14px; }
code, pre { font: 14px/1.45 ui-monospace, 'DejaVu Sans Mono', monospace; }
pre { background: #f4f4f4; padding: 10px 12px; overflow-x: auto; }
code { overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.card { flex: 1 1 150px; box-sizing: border-box; max-width: 340px;
  border: 1px solid #c8c8c8; border-radius: 6px; padding: 10px 14px; }
.card b { display: block; font-size: 24px; line-height: 1.25; }
.card span { display: block; color: #4a4a4a; font-size: 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 6px 0; }
th, td { padding: 4px 12px 4px 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e2e2e2; }
th { vertical-align: bottom; border-bottom: 2px solid #8a8a8a; }
th:first-child, td:first-child, .left { text-align: left; }
.facts td { vertical-align: top; }
.facts td:last-child { text-align: left; white-space: normal;
  overflow-wrap: anywhere; }
tr.total td { font-weight: 600; border-bottom: none; }
.bar { display: inline-block; width: 120px; height: 11px; background: #e6e6e6;
  vertical-align: -1px; }
.share { display: inline-block; width: 3.2em; }
.bar i { display: block; height: 11px; background: BLUE; }
.panels { display: grid; gap: 14px 12px;
  grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
.panels.large { grid-template-columns: repeat(auto-fit, minmax(205px, 1fr)); }
figure { margin: 0; }
.large figure { max-width: 420px; }
figure img { width: 100%; height: auto; display: block; }
.pixels img { image-rendering: pixelated; }
figcaption { font-size: 14px; margin-top: 3px; }
.chart { max-width: 560px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 14px;
  margin: 8px 0; padding: 0; list-style: none; }
.legend i { display: inline-block; width: 14px; height: 14px;
  border: 1px solid #555; vertical-align: -2px; margin-right: 6px; }
summary { cursor: pointer; font-weight: 600; margin: 14px 0 8px; }
.scale { display: flex; align-items: center; gap: 8px; font-size: 14px; }
.scale i { width: 160px; height: 12px; border: 1px solid #555; }
@media (max-width: 560px) {
  body { padding: 8px 12px 32px; }
  h1 { font-size: 24px; }
  .panels, .panels.large {
    grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); }
  .bar { display: none; }
  th, td { padding-right: 7px; }
  th { white-space: normal; }
  .share { width: auto; }
  .facts td:first-child { white-space: normal; overflow-wrap: anywhere;
    min-width: 84px; }
}
"""


def page(title: str, body: Sequence[str]) -> str:
    """A whole page from its parts."""
    style = _STYLE.replace('BLUE', BLUE)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, '
        'initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n'
        '<body>\n' + '\n'.join(body) + '\n</body>\n</html>\n'
    )


def cards(values: Mapping[str, tuple[str, str]]) -> str:
    """A large figure and a line below it for each name."""
    inside = ''.join(
        f'<div class="card"><span>{escape(name)}</span>'
        f'<b>{escape(figure)}</b><span>{escape(below)}</span></div>'
        for name, (figure, below) in values.items()
    )
    return f'<div class="cards">{inside}</div>'


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    total: bool = False,
    left: Sequence[int] = (),
) -> str:
    """Cells are HTML; those that are not must be escaped before.

    Args:
        heads (Sequence[str]): Column titles.
        rows (Sequence[Sequence[str]]): Cells.
        total (bool): Whether the last row sums up. Defaults to False.
        left (Sequence[int]): Columns, besides the first, that are aligned
            left.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return ''.join(
            f'<{tag}{" class=left" if i in left else ""}>{cell}</{tag}>'
            for i, cell in enumerate(cells)
        )

    body = [f'<tr>{line(row, "td")}</tr>' for row in rows]
    if total:
        body[-1] = body[-1].replace('<tr>', '<tr class="total">', 1)
    return (
        f'<div class="wide"><table><thead><tr>{line(heads, "th")}</tr>'
        f'</thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def facts(values: Mapping[str, str]) -> str:
    """Names and what they are, as a table of two columns; plain text."""
    rows = ''.join(
        f'<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>'
        for name, value in values.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def share_bar(share: float) -> str:
    """A share in per cent with a bar."""
    width = f'{min(max(share, 0.0), 1.0):.1%}'
    bar = f'<span class="bar"><i style="width:{width}"></i></span>'
    return f'{bar}<span class="share">{share:.0%}</span>'


def picture(image: np.ndarray, caption: str) -> str:
    """An RGB image, uint8, with its caption."""
    done, data = cv2.imencode('.png', np.ascontiguousarray(image[..., ::-1]))
    if not done:
        raise ValueError(f'cannot write an image of shape {image.shape}')
    uri = f'data:image/png;base64,{base64.b64encode(data).decode()}'
    text = escape(caption)
    return (
        f'<figure><img alt="{text}" src="{uri}" loading="lazy">'
        f'<figcaption>{text}</figcaption></figure>'
    )


def panels(
    items: Sequence[Panel], large: bool = False, pixels: bool = False
) -> str:
    """Panels beside each other, as many as fit.

    Args:
        items (Sequence[Panel]): Images with titles.
        large (bool): Fewer in a row. Defaults to False.
        pixels (bool): Whether enlarging keeps the pixels' edges. Defaults to
            False.
    """
    kinds = 'panels' + ' large' * large + ' pixels' * pixels
    inside = ''.join(picture(item.image, item.title) for item in items)
    return f'<div class="{kinds}">{inside}</div>'


def chart(figure: Figure, description: str) -> str:
    """A figure as a drawing that stays sharp."""
    data = base64.b64encode(to_svg(figure).encode()).decode()
    return (
        f'<figure class="chart"><img alt="{escape(description)}" '
        f'src="data:image/svg+xml;base64,{data}"></figure>'
    )


def legend(colours: Mapping[str, Sequence[float] | str], title: str) -> str:
    """Colours, as matplotlib takes them, by name, after a title."""
    items = ''.join(
        f'<li><i style="background:{to_hex(colour)}"></i>{escape(name)}</li>'
        for name, colour in colours.items()
    )
    return f'<ul class="legend"><li>{escape(title)}</li>{items}</ul>'


def colour_scale(
    colours: Sequence[Sequence[float]], low: str, high: str
) -> str:
    """A strip of colours between what its ends mean."""
    stops = ', '.join(to_hex(colour) for colour in colours)
    return (
        f'<div class="scale">{escape(low)}<i style="background:'
        f'linear-gradient(90deg, {stops})"></i>{escape(high)}</div>'
    )
