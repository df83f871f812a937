"""Batches that depend on the seed and the position in the run alone.

Augmentation normally draws from generators whose state depends on the worker
and on everything drawn before, so a resumed run sees other crops than an
uninterrupted one. Here the sampler numbers its draws and the first transform
seeds the generators by that number: the n-th image of a run is the same for
any number of workers and processes, and after any interruption.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import DefaultSampler, InfiniteSampler

from .registry import register

__all__ = ['NumberedInfiniteSampler', 'NumberedSampler', 'SeedAugmentation']


class Draw(int):
    """A dataset index that knows it is the ``number``-th drawn in a run."""

    number: int

    def __new__(cls, index: int, number: int = 0) -> Draw:
        draw = super().__new__(cls, index)
        draw.number = number
        return draw


@register('DATA_SAMPLERS')
class NumberedInfiniteSampler(InfiniteSampler):
    """mmengine's ``InfiniteSampler``, each index numbered by its draw.

    The numbers run through all processes: the first B draws are the same
    images with the same numbers for one process and for several.
    """

    def _indices_of_rank(self) -> Iterator[Draw]:
        for turn, index in enumerate(super()._indices_of_rank()):
            yield Draw(index, turn * self.world_size + self.rank)


@register('DATA_SAMPLERS')
class NumberedSampler(DefaultSampler):
    """mmengine's ``DefaultSampler``, each index numbered by its draw.

    For epoch-based loops; the numbers run through all epochs and processes.
    """

    def __iter__(self) -> Iterator[Draw]:
        first = self.epoch * self.total_size + self.rank
        for turn, index in enumerate(super().__iter__()):
            yield Draw(index, first + turn * self.world_size)


def mix_seed(*parts: int) -> int:
    """One well-spread 32-bit seed from several integers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@register('TRANSFORMS')
class SeedAugmentation(BaseTransform):
    """Seed the generators by the draw; the first step of a pipeline.

    Does nothing for indices that carry no number, from other samplers.

    Args:
        seed (int): Different seeds augment differently. Defaults to 0.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def transform(self, results: dict) -> dict:
        draw = results.get('sample_idx')
        if isinstance(draw, Draw):
            seed = mix_seed(self.seed, draw.number)
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        return results
