from pm_seg.utils import median, time_interleaved


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
