"""What a run does when something goes wrong: clear stops, nothing lost."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..utils.checkpoints import latest_intact_checkpoint


class RunStoppedError(RuntimeError):
    """A run that ended early, on purpose: why, how to go on, and the exit
    status of the tool."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def how_to_go_on(work_dir: str | Path, finite: bool = False) -> str:
    """Name the checkpoint that ``--resume`` would go on from, with ``finite``
    the last without NaN or inf in its weights."""
    found = latest_intact_checkpoint(work_dir, finite)
    if found is None:
        return f'There is no good checkpoint in {work_dir} yet: start anew'
    return f'Last good checkpoint: {found}'


def dead_worker(error: BaseException | None) -> str | None:
    """Torch's words if a process of a data loader died, not its code.

    Torch raises them wherever the main process is, in a signal handler:
    what was running there may have raised another error from them.
    """
    words = r'DataLoader worker .*(exited unexpectedly|killed by signal)'
    while error is not None:
        text = str(error)
        if isinstance(error, RuntimeError) and re.search(words, text):
            return text.split('\n')[0].rstrip('. ')
        error = error.__cause__ or error.__context__
    return None


def _labels(samples: object) -> Iterator[tuple[object, Tensor]]:
    """Data samples of a batch, nested where augmented, and their labels."""
    if isinstance(samples, (list, tuple)):
        for item in samples:
            yield from _labels(item)
        return
    label = getattr(samples, 'gt_label', None)
    if hasattr(samples, 'gt_sem_seg'):
        label = samples.gt_sem_seg.data
    if isinstance(label, Tensor) and not label.is_floating_point():
        yield samples, label


def check_labels(
    model: nn.Module, batch: object, first: int = 0, step: int = 1
) -> None:
    """Raise ``ValueError`` if a label is none of the model's classes.

    On a GPU such a label ends the process without naming it, and mmseg's
    IoU leaves its pixels out. The batch is one before the data preprocessor;
    of maps every ``step``-th row is looked at, from the ``first`` on.
    """
    while hasattr(model, 'module'):  # distributed, test-time augmentation
        model = model.module
    head = getattr(model, 'decode_head', None) or getattr(model, 'head', None)
    if isinstance(head, nn.ModuleList):
        head = head[-1]
    classes = getattr(head, 'num_classes', None) or 0
    ignored = getattr(head, 'ignore_index', None)
    if not isinstance(batch, Mapping) or classes < 2:
        return
    for sample, label in _labels(batch.get('data_samples')):
        if label.dim() > 1:
            label = label[..., first::step, :]
        wrong = (label >= classes) | (label < 0)
        if ignored is not None:
            wrong &= label != ignored
        if not wrong.any():
            continue
        found = ', '.join(map(str, label[wrong].unique().tolist()[:8]))
        file = getattr(sample, 'seg_map_path', None)
        file = file or getattr(sample, 'img_path', None) or 'an image'
        also = '' if ignored is None else f' or {ignored} (ignored)'
        raise ValueError(
            f'{file} has label {found}, expected 0..{classes - 1}{also}: the '
            f'model has {classes} classes. Check num_classes, '
            'reduce_zero_label and the annotation'
        )


def explain(
    error: BaseException, work_dir: str | Path
) -> RunStoppedError | None:
    """The stop that an error of a run means, None for one of its own kind.

    For errors without a better message, says on stderr how to go on.
    """
    if isinstance(error, RunStoppedError):
        return error
    advice = how_to_go_on(work_dir)
    if isinstance(error, KeyboardInterrupt):
        return RunStoppedError(f'Stopped at once. {advice}', 130)
    if reason := dead_worker(error):
        return RunStoppedError(
            f'{reason}. A process that loads images died, mostly because '
            'memory or /dev/shm is full: lower num_workers or batch_size of '
            f'the data loader. {advice}'
        )
    if latest_intact_checkpoint(work_dir):
        print(f'The run stopped on an error. {advice}', file=sys.stderr)
    return None
