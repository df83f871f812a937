"""A progress bar instead of log lines."""

from __future__ import annotations

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ...registry import register
from ...utils.progress import ProgressReporter


@register('HOOKS')
class ProgressHook(Hook):
    """Shows training and testing as progress bars.

    For short runs at a prompt; set ``log_level='ERROR'`` to hide the log
    lines.

    Args:
        title (str): Shown in front of the bar while training. Defaults to
            'Training'.
    """

    priority = 'VERY_LOW'

    def __init__(self, title: str = 'Training') -> None:
        self.title = title

    def _open(self, title: str, total: int, start: int = 0) -> None:
        self._report = ProgressReporter(title, total, start)
        self._report.console.quiet = not is_main_process()
        self._report.__enter__()

    def before_train_epoch(self, runner: Runner) -> None:
        self._open(self.title, runner.max_iters, runner.iter)

    def after_train_iter(self, runner: Runner, **kwargs) -> None:
        loss = runner.message_hub.get_scalar('train/loss').current()
        self._report(runner.iter + 1, f'loss {loss:.3f}')

    def before_test_epoch(self, runner: Runner) -> None:
        self._open('Testing', len(runner.test_dataloader))

    def after_test_iter(
        self, runner: Runner, batch_idx: int, **kwargs
    ) -> None:
        self._report(batch_idx + 1)

    def after_train_epoch(self, runner: Runner, **kwargs) -> None:
        self._report.__exit__()

    after_test_epoch = after_train_epoch
