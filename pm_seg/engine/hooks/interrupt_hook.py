"""Saves before a run ends on Ctrl-C or at the wish of a scheduler."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from types import FrameType

import torch
from mmengine.dist import all_reduce, barrier, get_world_size
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from ...registry import register
from ..faults import RunStoppedError, how_to_go_on


@register('HOOKS')
class InterruptHook(Hook):
    """Turns SIGINT and SIGTERM into a checkpoint and a clear end.

    The iteration under way is finished and saved, also during a validation,
    and ``RunStoppedError`` is raised. A second signal, or one before the first
    iteration, stops at once. Runs by epochs cannot go on inside one: theirs
    end without saving and name the checkpoint of the last whole epoch.

    ``tools/train.py`` adds it to every run.

    Args:
        interval (int): In distributed runs, iterations after which processes
            agree on whether one of them was told to stop. Defaults to 10.
    """

    priority = 'LOWEST'  # after the checkpoint of the same iteration

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self._requested = 0  # the signal
        self._done: int | None = None  # iterations, once training has begun
        self._inside = False
        self._stopping = False
        self._handlers = ExitStack()

    def before_run(self, runner: Runner) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python lets no other thread handle signals
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._handle)
            self._handlers.callback(signal.signal, number, previous)

    def release(self, runner: Runner | None = None) -> None:
        """Put the signal handlers back that were there before."""
        self._handlers.close()

    after_run = release

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested or self._done is None:
            self.release()
            raise KeyboardInterrupt
        self._requested = number
        if hasattr(signal, 'SIGCHLD'):
            # The same signal ends the processes that load images; torch
            # would raise an error for that in the middle of the iteration.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        name = signal.Signals(number).name
        text = f'{name}: saving after this iteration. Again: stop at once.\n'
        os.write(2, text.encode())  # print could be inside itself here

    def before_train(self, runner: Runner) -> None:
        self._done = runner.iter

    def before_train_iter(self, runner: Runner, **kwargs) -> None:
        self._inside = True

    def after_train_iter(
        self, runner: Runner, batch_idx: int, **kwargs
    ) -> None:
        self._inside = False
        self._done = runner.iter + 1
        if self._agreed(batch_idx):
            self.stop(runner)

    def after_val_iter(self, runner: Runner, batch_idx: int, **kwargs) -> None:
        if self._done is None or not self._agreed(batch_idx):
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):  # it swapped its weights in
                hook.after_val_epoch(runner)
        self.stop(runner)

    def after_train(self, runner: Runner) -> None:
        self._done = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self._stopping:  # runners count for the end of an iteration alone
            checkpoint['meta'].update(epoch=runner.epoch, iter=self._done)

    def _agreed(self, batch_idx: int) -> bool:
        """Whether to stop now; the same in all processes."""
        if get_world_size() > 1 and (batch_idx + 1) % self.interval:
            return False
        votes = torch.tensor(self._requested)
        all_reduce(votes, 'max')
        if votes:  # if not, a signal that comes now is for the next time
            self._requested = int(votes)
        return bool(votes)

    @property
    def between_iterations(self) -> bool:
        """Whether a stop is wished for and the weights are whole."""
        return bool(self._requested) and not self._inside

    def stop(self, runner: Runner) -> None:
        """Save what is not saved already, and raise ``RunStoppedError``."""
        self.release()
        done = self._done
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            stopped = f'stopped after iteration {done}, inside an epoch'
        else:
            stopped = f'stopped and saved after iteration {done}'
            self._stopping = True
            file = f'iter_{done}.pth'
            hooks = [h for h in runner.hooks if isinstance(h, CheckpointHook)]
            if not hooks:
                runner.save_checkpoint(runner.work_dir, file, by_epoch=False)
            elif not (hooks[0].last_ckpt or '').endswith(file):
                hooks[0]._save_checkpoint_with_step(runner, done, {})
            barrier()  # so that all processes name this checkpoint
        raise RunStoppedError(
            f'{signal.Signals(self._requested).name}: {stopped}. '
            f'{how_to_go_on(runner.work_dir)}',
            128 + self._requested,
        )
