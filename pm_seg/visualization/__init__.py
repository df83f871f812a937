"""Pictures of token groups, scores and predictions."""

from .figures import (
    depth_figure,
    panel_figure,
    ranking_figure,
    save_figure,
    to_array,
    to_svg,
)
from .panels import (
    CHANGED,
    JUDGED,
    Panel,
    draw_difference,
    draw_groups,
    group_panels,
    make_palette,
    paint_labels,
    prediction_panels,
    score_panels,
)

__all__ = [
    'CHANGED',
    'JUDGED',
    'Panel',
    'depth_figure',
    'draw_difference',
    'draw_groups',
    'group_panels',
    'make_palette',
    'paint_labels',
    'panel_figure',
    'prediction_panels',
    'ranking_figure',
    'save_figure',
    'score_panels',
    'to_array',
    'to_svg',
]
