"""Batches that depend on seed and position alone."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from pm_seg.datasets import (
    Draw,
    NumberedInfiniteSampler,
    NumberedSampler,
    SeedAugmentation,
    mix_seed,
)


class Augmented(Dataset):
    """Returns the index and what its augmentation would draw."""

    def __init__(self) -> None:
        self.seeding = SeedAugmentation(seed=3)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        self.seeding.transform(dict(sample_idx=index))
        return torch.tensor(
            [float(index), np.random.rand(), torch.rand(1).item()]
        )


def batches(workers: int, count: int, skip: int = 0) -> torch.Tensor:
    sampler = NumberedInfiniteSampler(Augmented(), seed=1)
    if skip:
        sampler.indices = itertools.islice(sampler.indices, skip, None)
    loader = DataLoader(
        Augmented(), batch_size=2, sampler=sampler, num_workers=workers
    )
    return torch.stack(list(itertools.islice(loader, count)))


def test_draws_survive_pickling() -> None:
    draw = pickle.loads(pickle.dumps(Draw(7, 42)))
    assert draw == 7 and draw.number == 42


@pytest.mark.parametrize('workers', [0, 1, 2])
def test_independent_of_workers_and_interruptions(workers: int) -> None:
    whole = batches(0, 12)
    assert len(whole[..., 1].unique()) == 24, 'each draw is augmented anew'
    np.random.seed(workers)
    assert torch.equal(batches(workers, 12), whole)
    assert torch.equal(batches(workers, 6, skip=12), whole[6:])


def test_processes_share_the_draws() -> None:
    one = NumberedInfiniteSampler(range(10), seed=1)
    expected = [(int(d), d.number) for d in itertools.islice(one, 8)]
    parts = []
    for rank in (0, 1):
        sampler = NumberedInfiniteSampler(range(10), seed=1)
        sampler.rank, sampler.world_size = rank, 2
        parts.append(list(itertools.islice(sampler, 4)))
    both = [d for pair in zip(*parts) for d in pair]
    assert [(int(d), d.number) for d in both] == expected


def test_epochs_number_their_draws() -> None:
    """Any epoch alone, by one process or two, draws what it always draws."""
    one = NumberedSampler(range(10), seed=1)
    for epoch in (2, 0):
        one.set_epoch(epoch)
        expected = [(int(d), d.number) for d in one]
        first = epoch * 10
        assert [n for _, n in expected] == list(range(first, first + 10))
        assert sorted(i for i, _ in expected) == list(range(10))
        parts = []
        for rank in (0, 1):
            sampler = NumberedSampler(range(10), seed=1)
            sampler.rank, sampler.world_size = rank, 2
            sampler.set_epoch(epoch)
            parts.append(list(sampler))
        both = [d for pair in zip(*parts) for d in pair]
        assert [(int(d), d.number) for d in both] == expected


def test_other_samplers_are_left_alone() -> None:
    state = np.random.get_state()[1].copy()
    SeedAugmentation().transform(dict(sample_idx=3))
    SeedAugmentation().transform(dict())
    assert (np.random.get_state()[1] == state).all()


def test_mix_seed() -> None:
    seeds = {mix_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**32 for seed in seeds)
