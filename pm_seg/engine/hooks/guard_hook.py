"""Stops a run before bad data or a bad loss spoil it."""

from __future__ import annotations

import math
import warnings

from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner

from ...registry import register
from ..faults import RunStoppedError, check_labels, how_to_go_on


@register('HOOKS')
class RunGuardHook(Hook):
    """Looks at the data and the loss of every iteration.

    - A label that is no class of the model stops training with a
      ``ValueError``; in tests it is a warning, because stock metrics accept
      it. Where a GPU trains, an eighth of the rows is looked at before the
      iteration, another one each time, and all if it fails: a whole batch
      would take longer than the GPU can wait.
    - A loss of NaN or inf raises ``RunStoppedError`` before a checkpoint with
      such weights is saved, naming the last good one.

    ``tools/train.py`` and ``tools/test.py`` add it to every run.

    Args:
        patience (int): Iterations in a row with a loss of NaN or inf to go on
            for in mixed precision, whose loss scaling skips them. Defaults to
            10.
    """

    priority = 'LOW'

    def __init__(self, patience: int = 10) -> None:
        self.patience = patience
        self._bad = 0
        self._warned = False
        self._batch: dict | None = None

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict
    ) -> None:
        cuda = next(runner.model.parameters()).is_cuda
        step = 8 if cuda else 1
        self._batch = data_batch
        check_labels(runner.model, data_batch, runner.iter % step, step)

    def blame(self, runner: Runner) -> None:
        """Raise ``ValueError`` if labels are why an iteration failed."""
        check_labels(runner.model, self._batch)

    def before_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict
    ) -> None:
        try:
            if not self._warned:
                check_labels(runner.model, data_batch)
        except ValueError as error:
            self._warned = True
            warnings.warn(f'{error}. Metrics leave it out', stacklevel=2)

    before_test_iter = before_val_iter

    def after_train_iter(
        self, runner: Runner, outputs: dict | None = None, **kwargs
    ) -> None:
        loss = outputs.get('loss') if isinstance(outputs, dict) else None
        loss = 0.0 if loss is None else float(loss.detach())
        self._bad = 0 if math.isfinite(loss) else self._bad + 1
        mixed = isinstance(runner.optim_wrapper, AmpOptimWrapper)
        if self._bad > (self.patience if mixed else 0):
            raise RunStoppedError(
                f'The loss is {loss} at iteration {runner.iter + 1}, '
                'expected a finite number. Nothing of this iteration was '
                'saved. Lower the learning rate, add clip_grad to '
                'optim_wrapper, or train without --amp. '
                + how_to_go_on(runner.work_dir, finite=True)
            )
