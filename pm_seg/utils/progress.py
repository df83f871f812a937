"""Progress with time left: a bar on a terminal, a few lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


class ProgressReporter:
    """Context manager that reports how far a loop has come, on stderr.

    Args:
        title (str): What is being done.
        total (int): Number of steps.

    Example:
        >>> with ProgressReporter('Scoring', 50) as report:
        ...     for step in range(50):
        ...         report(step + 1)
    """

    #: Lines printed when the output is not a terminal.
    num_lines = 5

    def __init__(self, title: str, total: int) -> None:
        self.title = title
        self.total = total
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._printed = 0

    def __enter__(self) -> ProgressReporter:
        self._start = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn('{task.description:<28}'),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn('{task.fields[note]}'),
                console=self.console,
            )
            self._task = self._bar.add_task(
                self.title, total=self.total, note=''
            )
            self._bar.start()
        return self

    def __call__(self, done: int, note: str = '') -> None:
        """Report that ``done`` steps are over."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        part = done * self.num_lines // self.total
        if part > self._printed:
            self._printed = part
            spent = time.monotonic() - self._start
            left = spent / done * (self.total - done)
            self.console.print(
                f'{self.title}: {done}/{self.total}, {left:.0f} s left'
                f'{f", {note}" if note else ""}',
                highlight=False,
            )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
