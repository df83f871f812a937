"""Pictures."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from matplotlib.text import Text
from tiny import batch, build

from pm_seg.engine import Measuring, compress
from pm_seg.visualization.figures import (
    depth_figure,
    panel_figure,
    ranking_figure,
    save_figure,
    to_array,
    to_svg,
)
from pm_seg.visualization.inspection import Inspection
from pm_seg.visualization.panels import (
    JUDGED,
    VERMILION,
    Panel,
    draw_difference,
    draw_groups,
    make_palette,
    paint_labels,
    rgb,
    score_panels,
)
from pm_seg.visualization.report import CompressionReport, png_uri


def test_groups_are_flat_outlined_and_pruned_ones_dark() -> None:
    image = np.full((32, 32, 3), 100, np.uint8)
    image[:, 16:] = 200
    group = np.array([[0, 1], [0, -1]])
    out = draw_groups(image, group)
    assert (out[2:14, 2:14] == 100).all()
    assert (out[2:14, 20:30] == 200).all()
    assert (out[20:30, 20:30] == 60).all()
    assert (out[2:14, 16] == 255).all(), 'border between groups'


def test_group_panels_say_what_is_kept() -> None:
    image = np.full((24, 32, 3), 90, np.uint8)  # padded to 32x32
    alone = np.arange(4).reshape(2, 2)
    groups = {'backbone': [alone, alone % 2, np.array([[0, 0], [-1, 0]])]}
    labels = np.zeros((24, 32), int)
    one = Inspection('x', image, groups, 16, image, labels, labels)
    dense, merged, pruned = one.group_panels()
    assert dense.title == 'backbone 0: dense' and (dense.image == 90).all()
    assert merged.title == 'backbone 1: 2 of 4'
    assert pruned.title == 'backbone 2: 1 of 4, 1 pruned'
    # Tokens are 160 pixels wide; half of the last row is padding.
    assert merged.image.shape == pruned.image.shape == (240, 320, 3)
    assert (pruned.image[162:, 2:158] == 27).all()
    assert (pruned.image[2:158, 2:158] == 90).all()


def test_scores_are_scaled_layer_by_layer() -> None:
    scores = np.zeros((3, 2, 2))
    scores[0] = [[0, 1], [2, 4]]
    scores[2] = 100 * scores[0]
    first, second = score_panels({'head': scores})
    assert (first.title, second.title) == ('head 0', 'head 2')
    assert first.image.shape == (320, 320, 3)
    assert np.array_equal(first.image, second.image)
    brightness = first.image.sum(-1)
    assert brightness[0, 0] < brightness[0, -1] < brightness[-1, 0]


def test_labels_are_painted() -> None:
    labels = np.array([[0, 1], [255, 1]])
    out = paint_labels(labels, [[1, 2, 3], [4, 5, 6]])
    assert out[0, 0].tolist() == [1, 2, 3] and out[1, 0].tolist() == [0, 0, 0]


def test_differences_are_judged_by_the_annotation() -> None:
    image = np.full((1, 5, 3), 128, np.uint8)
    dense = np.array([[0, 1, 1, 1, 1]])
    small = np.array([[0, 2, 2, 2, 2]])
    truth = np.array([[9, 1, 2, 3, 255]])
    out = draw_difference(image, dense, small, truth)[0]
    pale = out[0].tolist()
    assert pale[0] == pale[1] == pale[2] > 128
    assert out[4].tolist() == pale, 'not annotated'
    for pixel, name in (
        (1, 'now wrong'),
        (2, 'now right'),
        (3, 'wrong before and after'),
    ):
        assert tuple(out[pixel]) == rgb(JUDGED[name]), name
    plain = draw_difference(image, dense, small)[0]
    assert (plain[1:] == rgb(VERMILION)).all()
    one = Inspection('x', image, {}, 16, image, dense, small, truth)
    assert [panel.title for panel in one.prediction_panels({})] == [
        'image',
        'annotation',
        'dense',
        'compressed',
        'difference: 80.0% of the pixels',
    ]


def test_palettes_have_distinct_colours() -> None:
    colours = make_palette(40)
    assert len({tuple(c) for c in colours}) == 40
    assert np.array(colours).min() >= 0 and np.array(colours).max() <= 255


def test_no_text_leaves_a_figure() -> None:
    """Titles, legends and tick labels lie inside and apart."""
    image = np.zeros((36, 48, 3), np.uint8)
    panels = [Panel(f'decode_head {i}: 1234 of 4096', image) for i in range(6)]
    names = {f'class number {i}': (0.1, 0.2, 0.3) for i in range(20)}
    ranking = [('an exceedingly long class name, really', 0.9, 1.0)] * 8
    for figure in (
        panel_figure(panels, legend=names),
        panel_figure(panels[:1]),
        panel_figure(panels, score_bar=True),
        ranking_figure(image, ranking),
        depth_figure({'backbone': [100, 50], 'head': [30, 20]}, 'kept', 100),
    ):
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        whole = figure.get_tightbbox(renderer)
        width, height = figure.get_size_inches()
        assert whole.x0 >= 0 and whole.y0 >= 0
        assert whole.x1 <= width and whole.y1 <= height
        ticks = {
            text
            for axes in figure.axes
            for axis in (axes.xaxis, axes.yaxis)
            for text in axis.findobj(Text)
        }
        boxes = []
        for text in set(figure.findobj(Text)) - ticks:
            if text.get_visible() and text.get_text():
                assert text.get_fontsize() >= 9, text
                box = text.get_window_extent(renderer)
                boxes.append((text.get_text(), box))
        for i, (one, box) in enumerate(boxes):
            for other, second in boxes[:i]:
                assert not box.overlaps(second), (one, other)


def test_figures_become_pixels_files_and_drawings(tmp_path) -> None:
    figure = depth_figure({'backbone': [100, 50, 20]}, 'tokens kept, %')
    pixels = to_array(figure)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
    assert (pixels[0, 0] == 255).all() and pixels.min() < 50
    path = tmp_path / 'depth.png'
    save_figure(figure, path)
    assert cv2.imread(str(path)).shape == pixels.shape
    assert to_svg(figure).count('<svg') == 1


class Checker(HTMLParser):
    """Every tag is closed, and nothing comes from elsewhere."""

    void = ('meta', 'img', 'br')

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        assert tag not in ('script', 'link', 'iframe')
        if tag not in self.void:
            self.open.append(tag)
        values = dict(attrs)
        self.sources += [values[k] for k in ('src', 'href') if k in values]
        if tag == 'img':
            assert values['alt']

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def check_page(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert all(s.startswith('data:image/') for s in checker.sources)
    assert not re.search(r'url\(|@import', text)
    return checker


def test_a_page_stands_alone_and_escapes_names() -> None:
    model = build(type='paper').eval()
    compress(model, [batch(0, 2)], measuring=Measuring(1, 0))
    picture = np.zeros((64, 64, 3), np.uint8)
    labels = np.zeros((64, 64), int)
    groups = {'backbone': [np.arange(16).reshape(4, 4) % 3]}
    one = Inspection('<x>', picture, groups, 16, picture, labels, labels)
    ranked = Inspection('y', picture, {}, 16, picture, *2 * [np.ones(3) / 3])
    numbers = dict(dense=2, compressed=1)
    times = dict(dense=[2.0, 4.0], compressed=[1.0, 2.0])
    meta = dict(classes=['"sky" & <sea>', 'b', 'c'], palette=[[0, 0, 255]] * 3)
    page = CompressionReport(
        model,
        'a < b',
        {'file': 'a<b>.pth'},
        numbers,
        {'<fast>': times},
        {name: {'m & m': value} for name, value in numbers.items()},
        [one, ranked],
        meta,
    ).to_html()
    checker = check_page(page)
    # Chart, groups, prediction in three, image, and scores of three layers.
    assert len(checker.sources) == 1 + 1 + 4 + 1 + 3
    for raw in ('<fast>', 'a<b>', '<x>', '<sea>', 'a < b', ' & '):
        assert raw not in page, raw
    assert 'width:33.3%' in page and '#0000ff' in page and '#d55e00' in page
    assert '2.00x' in page and '+-' in page and '-1.00' in page


def test_unwritable_pictures_are_an_error() -> None:
    with pytest.raises(cv2.error):
        png_uri(np.zeros((0, 4, 3), np.uint8))
