import resource

import pytest
import torch

from pm_seg.utils import keep_freed_memory, median, time_interleaved


def test_functions_take_turns() -> None:
    calls: list[str] = []
    seconds = time_interleaved(
        {'a': lambda: calls.append('a'), 'b': lambda: calls.append('b')},
        rounds=3,
        warmup=2,
    )
    assert calls == ['a', 'a', 'b', 'b'] * 5
    assert [len(times) for times in seconds.values()] == [3, 3]
    assert median([3.0, 1.0, 2.0]) == 2.0


def test_what_was_freed_is_used_again() -> None:
    if not keep_freed_memory():
        pytest.skip('not glibc')
    pages = []
    for _ in range(12):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(2500, 1000) for _ in range(8)]
        del held
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        pages.append(after - before)
    assert min(pages[-4:]) < 100  # of 19,500
