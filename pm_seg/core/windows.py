"""ALGM's local merge, of 2x2 windows.

Norouzi et al., "ALGM: Adaptive Local-then-Global Token Merging for Efficient
Semantic Segmentation with Plain Vision Transformers", CVPR 2024. The paper's
number of merges differs from image to image; here each image merges equally
many, which is what allows batches and comparisons at equal cost.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .merging import Grid, Merge
from .similarity import all_rows, merge_into

WINDOW = 4  # tokens of a window


def match_windows(
    metric: Tensor, count: int, grid: Grid, num_prefix: int = 0
) -> Merge:
    """ALGM's local merge: the ``count`` most uniform 2x2 windows.

    Args:
        metric (Tensor): (B, h * w, D), float32. The similarity of a window is
            the mean cosine of its pairs.
        count (int): Windows to merge, at most (h // 2) * (w // 2); an odd
            last row or column is never merged.
        grid (tuple[int, int]): h and w.
        num_prefix (int): P.

    Returns:
        Merge: K = h * w - 3 * count.
    """
    height, width = grid
    index = torch.arange(height * width, device=metric.device)
    index = index.view(height, width)
    index = index[: height // 2 * 2, : width // 2 * 2]
    index = index.unflatten(0, (-1, 2)).unflatten(2, (-1, 2))
    index = index.transpose(1, 2).reshape(-1, WINDOW)  # (windows, 4)
    unit = F.normalize(metric, dim=-1)
    total = unit[:, index.flatten()].unflatten(1, (-1, WINDOW)).sum(2)
    chosen = total.square().sum(-1).topk(count, dim=1).indices
    members = index[chosen]  # (B, count, 4)
    first = members[:, :, :1].expand(-1, -1, WINDOW - 1)
    rows = all_rows(metric, num_prefix)
    moved, goal = (
        rows[:, num_prefix:].gather(1, part.flatten(1))
        for part in (members[:, :, 1:], first)
    )
    return merge_into(rows, moved, goal)
