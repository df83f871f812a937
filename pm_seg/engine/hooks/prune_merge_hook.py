"""Scores, then structure, before the first training iteration."""

from __future__ import annotations

from functools import partial

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch.distributed.fsdp import FullyShardedDataParallel

from ...models.distillation import DistillationMixin
from ...registry import register
from ...utils.progress import TimeLeft
from ...visualization.layers import describe
from ..compression import Measuring, calibration_loader, compress
from ..evaluation import measure
from ..scoring import require_compressible, uncompressed
from ..targets import check_target


@register('HOOKS')
class PruneMergeHook(Hook):
    """Compresses the model before training starts.

    Measures on training batches what makes tokens important and how they best
    get fewer over depth (the paper's form: gathers gradient-weighted scores
    and derives the structure from them), loads the teacher if the model
    distils, and lets training go on. A model that was compressed already,
    because a compressed checkpoint was loaded or the run resumed, keeps what
    it has.

    Images come from the training loader, through ``calib_pipeline`` if the
    config has one, else through its own transforms. Measuring changes no
    weight and no random state: what follows is the same run with or without.

    Args:
        calib_batches, score_batches, seed (int): See
            :class:`~pm_seg.engine.Measuring`.
        target (dict, optional): A budget of the whole model instead of the
            ``keep`` of the config, see
            :func:`pm_seg.engine.targets.meet_target`. Defaults to None.
        evaluate (bool): Whether to run the validation before compression and
            straight after it. Defaults to False.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self,
        calib_batches: int = 8,
        score_batches: int = 50,
        seed: int = 0,
        target: dict[str, float] | None = None,
        evaluate: bool = False,
    ) -> None:
        self.measuring = Measuring(score_batches, calib_batches, seed)
        if target is not None:
            check_target(target)
        self.target = target
        self.evaluate = evaluate

    def before_train(self, runner: Runner) -> None:
        """Compress, unless the checkpoint is compressed already."""
        model = runner.model
        sharded = isinstance(model, FullyShardedDataParallel)
        if is_model_wrapper(model):
            model = model.module
        modules = require_compressible(model)
        if all(m.compressor.compressed for m in modules.values()):
            runner.logger.info(
                'The checkpoint is compressed already, keeping its structure'
            )
        elif sharded:
            raise RuntimeError(
                'the parameters are sharded (FSDP), and measuring needs the '
                'whole model: compress the checkpoint first with '
                'tools/compress.py and train from that, load_from=PM.pth'
            )
        else:
            with uncompressed(model):
                self._evaluate(runner, 'Before compression')
            # A loader of its own, so that training sees its batches unshifted.
            loader = calibration_loader(runner.cfg)
            log = partial(self._log, runner)
            compress(model, loader, None, self.target, self.measuring, log)
            self._evaluate(runner, 'Straight after compression')
        if not sharded:  # the table reads shapes of whole parameters
            runner.logger.info(f'Token compression\n{describe(model)}')
        if isinstance(model, DistillationMixin):
            # A resumed run's load_from is its own checkpoint, not a teacher.
            dense = None if runner._resume else runner._load_from
            model.load_teacher(dense)

    def _evaluate(self, runner: Runner, title: str) -> None:
        """Validation without the hooks: this is no result of the run."""
        loop = runner.val_loop
        if not self.evaluate or loop is None:
            return
        runner.logger.info(f'{title}: evaluating')
        metrics = measure(runner.model, loop.dataloader, loop.evaluator)
        shown = '  '.join(f'{k}: {v:.2f}' for k, v in metrics.items())
        runner.logger.info(f'{title}: {shown}')

    def _log(self, runner: Runner, title: str, done: int, total: int) -> None:
        """Five lines on each thing that is measured."""
        if done == 0:
            self._left = TimeLeft()
        elif done % max(total // 5, 1) == 0 or done == total:
            left = self._left(done, total)
            runner.logger.info(f'{title} [{done}/{total}], {left}')
