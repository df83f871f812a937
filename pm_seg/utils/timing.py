"""Interleaved timing of several functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 15,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each call of functions that take turns, by name.

    Drifts of the machine hit all alike. In each turn a function is called
    twice and the second call is timed: the first brings back its weights and
    memory, which the functions before it took from the caches. ``warmup``
    turns before the ``rounds`` are not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(-warmup, rounds):
        for name, function in functions.items():
            for _ in range(2):
                start = time.perf_counter()
                function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds
