"""Progress with time left: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


def duration(seconds: float) -> str:
    """Seconds in words, no finer than an estimate is: '40 s', '3 min'."""
    if seconds < 100:
        return f'{seconds:.0f} s'
    minutes = round(seconds / 60)
    if minutes < 100:
        return f'{minutes} min'
    return f'{minutes // 60} h {minutes % 60} min'


class TimeLeft:
    """Estimates how long a loop will take; made when the loop starts, after
    ``start`` steps of an earlier run."""

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self._begin = time.monotonic()

    def __call__(self, done: int, total: int) -> str:
        """'12 s left', or at the end 'took 40 s'; '' if nothing is known."""
        spent = time.monotonic() - self._begin
        if done >= total:
            return f'took {duration(spent)}'
        if done <= self.start:
            return ''
        left = spent / (done - self.start) * (total - done)
        return f'{duration(max(left, 1))} left'


class ProgressReporter:
    """Context manager that reports how far a loop has come, on stderr.

    Time is counted from entering it, so enter it before the first step.

    Args:
        title (str): What is being done.
        total (int): Number of steps.
        start (int): Steps that an earlier run made. Defaults to 0.

    Example:
        >>> with ProgressReporter('Scoring', 50) as report:
        ...     for step in range(50):
        ...         report(step + 1)
    """

    #: Lines printed when the output is not a terminal.
    num_lines = 5

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self.title = title
        self.total = total
        self.start = start
        self.console = Console(stderr=True)
        self._bar = Progress(
            TextColumn('{task.description}'),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn('{task.fields[note]}'),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._printed = start * self.num_lines // max(total, 1)

    def __enter__(self) -> ProgressReporter:
        self._left = TimeLeft(self.start)
        self._task = self._bar.add_task(
            self.title, total=self.total, completed=self.start, note=''
        )
        self._bar.start()
        return self

    def __call__(self, done: int, note: str = '') -> None:
        """Report that ``done`` steps are over."""
        self._bar.update(self._task, completed=done, note=note)
        part = done * self.num_lines // max(self.total, 1)
        if self._bar.disable and part > self._printed:
            self._printed = part
            counts = f'{self.title}: {done}/{self.total}'
            texts = counts, self._left(done, self.total), note
            self.console.out(', '.join(filter(None, texts)), highlight=False)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


@contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yields what shows progress, one bar after the other: it is called with
    a title, the steps done, 0 at first, and their total."""
    with ExitStack() as stack:
        reports: dict[str, ProgressReporter] = {}

        def progress(title: str, done: int, total: int) -> None:
            if title not in reports:
                reporter = ProgressReporter(title, total)
                reports[title] = stack.enter_context(reporter)
            reports[title](done)
            if done == total:
                stack.close()

        yield progress
