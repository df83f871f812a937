"""A progress bar instead of log lines."""

from __future__ import annotations

from contextlib import ExitStack

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import register
from ...utils.progress import ProgressReporter


@register('HOOKS')
class ProgressHook(Hook):
    """Shows training, validation and testing as progress bars.

    For short runs at a prompt; set ``log_level='ERROR'`` to hide the log
    lines.

    Args:
        title (str): Shown in front of the bar while training. Defaults to
            'Training'.
    """

    priority = 'VERY_LOW'

    def __init__(self, title: str = 'Training') -> None:
        self.title = title
        self._stack = ExitStack()

    def _open(self, title: str, total: int, start: int = 0) -> None:
        reporter = ProgressReporter(title, total, start)
        reporter.console.quiet = not is_main_process()
        self._report = self._stack.enter_context(reporter)

    def before_train_epoch(self, runner: Runner) -> None:
        self._open(self.title, runner.max_iters, runner.iter)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        loss = runner.message_hub.get_scalar('train/loss').current()
        self._report(runner.iter + 1, f'loss {loss:.3f}')

    def after_train_epoch(self, runner: Runner) -> None:
        self._stack.close()

    def before_test_epoch(self, runner: Runner) -> None:
        self._open('Testing', len(runner.test_dataloader))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        self._report(batch_idx + 1)

    def after_test_epoch(self, runner: Runner, metrics=None) -> None:
        self._stack.close()
