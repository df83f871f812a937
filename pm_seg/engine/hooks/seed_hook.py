"""Dropout and drop path that do not depend on interruptions."""

from __future__ import annotations

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...datasets import mix_seed
from ...registry import register


@register('HOOKS')
class SeedIterationHook(Hook):
    """Seeds torch before every training iteration by its number.

    mmengine saves no generator states, so a resumed run would drop other
    paths than an uninterrupted one. With this hook and
    :mod:`pm_seg.datasets` it follows the same loss curve.

    Args:
        seed (int): Defaults to 0.
    """

    priority = 'VERY_HIGH'

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def before_train_iter(self, runner: Runner, **kwargs) -> None:
        torch.manual_seed(mix_seed(self.seed, runner.iter, get_rank()))
