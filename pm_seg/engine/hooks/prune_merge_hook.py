"""Scores, then structure, before the first training iteration."""

from __future__ import annotations

import time

from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from ..scoring import compress, describe, require_compressible


@HOOKS.register_module()
class PruneMergeHook(Hook):
    """Compresses the model before training starts.

    Gathers gradient-weighted scores over training batches, derives the
    structure of every compressible module and lets training go on with it.
    A model that has its structure already, because a compressed checkpoint
    was loaded or the run resumed, is left as it is.

    Scoring changes no weight and no random state: what follows is the same
    run with or without it.

    Args:
        score_iters (int): Training batches to score. Defaults to 50.
        reduction (str): See :class:`pm_seg.core.ScoreRecorder`. Defaults to
            'image'.
        seed (int): Seed of the batches and their augmentation. Defaults to
            0.

    Example:
        >>> custom_hooks = [dict(type='PruneMergeHook', score_iters=50)]
    """

    priority = 'VERY_HIGH'

    def __init__(
        self, score_iters: int = 50, reduction: str = 'image', seed: int = 0
    ) -> None:
        if score_iters < 1:
            raise ValueError(
                f'score_iters={score_iters} must be at least 1 batch'
            )
        self.score_iters = score_iters
        self.reduction = reduction
        self.seed = seed

    def before_train(self, runner: Runner) -> None:
        """Score and compress, unless there is a structure already."""
        model = runner.model
        if is_model_wrapper(model):
            model = model.module
        modules = require_compressible(model)
        if all(m.compressor.has_structure for m in modules.values()):
            runner.logger.info(
                'The checkpoint is compressed already, keeping its structure'
            )
        else:
            self._compress(runner, model)
        runner.logger.info(f'Token compression\n{describe(model)}')

    def _compress(self, runner: Runner, model: BaseModel) -> None:
        runner.logger.info(f'Scoring {self.score_iters} training batches')
        step = max(self.score_iters // 5, 1)
        start = time.time()

        def progress(done: int) -> None:
            if done % step == 0 or done == self.score_iters:
                left = (time.time() - start) / done * (self.score_iters - done)
                runner.logger.info(
                    f'Scored [{done}/{self.score_iters}] batches, '
                    f'{left:.0f} s left'
                )

        # A loader of its own, so that training sees its batches unshifted.
        compress(
            model,
            runner._train_dataloader,
            self.score_iters,
            self.reduction,
            self.seed,
            progress,
        )
