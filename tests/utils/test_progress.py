"""Bars and lines, and what they say about the time left."""

from __future__ import annotations

import pytest

from pm_seg.utils import progress
from pm_seg.utils.progress import ProgressReporter, TimeLeft, duration


class Clock:
    """Stands in for the module ``time``; moved on by the tests."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, 'time', clock)
    return clock


def test_lines_where_there_is_no_terminal(capsys, clock: Clock) -> None:
    with ProgressReporter('Working', 10) as report:
        report(0)
        for step in range(10):
            clock.now += 3
            report(step + 1, 'note [a]')
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == 'Working: 2/10, 24 s left, note [a]'
    assert lines[-1] == 'Working: 10/10, took 30 s, note [a]'


def test_a_slow_first_step_is_timed(capsys, clock: Clock) -> None:
    """The clock runs from entering, not from the first finished step."""
    with ProgressReporter('Working', 5) as report:
        clock.now += 20
        report(1)
    assert '1/5, 80 s left' in capsys.readouterr().err


def test_going_on_counts_the_new_steps_alone(capsys, clock: Clock) -> None:
    with ProgressReporter('Training', 100, 50) as report:
        report(50)
        clock.now += 10
        report(60)
    assert capsys.readouterr().err == 'Training: 60/100, 40 s left\n'


def test_lines_are_not_wrapped(capsys) -> None:
    title = 'word ' * 40
    with ProgressReporter(title, 1) as report:
        report(1)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_bar_on_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setenv('FORCE_COLOR', '1')
    with ProgressReporter('Working', 3) as report:
        for step in range(3):
            report(step + 1)
    assert '3/3' in capsys.readouterr().err


def test_unknown_before_the_first_step(clock: Clock) -> None:
    left = TimeLeft(start=4)
    clock.now += 5
    assert left(4, 10) == ''
    assert left(5, 10) == '25 s left'


@pytest.mark.parametrize(
    ('seconds', 'text'),
    [(0.2, '0 s'), (99, '99 s'), (119, '2 min'), (6060, '1 h 41 min')],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
