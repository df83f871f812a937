"""Less noise from dependencies: lines that no user can act on."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

#: Printed while OpenMMLab packages are imported, and beginnings of warnings
#: (mmcv without compiled operators, of which pm_seg needs none; torch 2.4).
IMPORT_NOISE = ('Could not import OneDL',)
IMPORT_WARNINGS = ('Fail to import', '`TorchScript` support')

#: Beginnings of warnings on the way to the first iteration.
WARNING_NOISE = (
    'Default ``avg_non_ignore`` is False',
    'The draw is False',
    '.*has been created, the method `get_instance`',
    '.*`reduce_zero_label` will be deprecated',
    '``build_loss`` would be deprecated',
    r'.*`lr_scheduler.step\(\)` before `optimizer.step',
)

#: Beginnings of log records of mmengine that are for the log file alone:
#: hundreds of lines about the environment, the config, the hooks and the
#: optimiser's parameters, and warnings about how mmengine and mmseg are
#: written themselves.
LOG_NOISE = (
    f'\n{"-" * 60}\nSystem environment:',
    'Config:\n',
    'Hooks will be executed in the following order',
    'paramwise_options -- ',
    'Distributed training is not used, all SyncBatchNorm',
    'The prefix is not set in metric class',
    '"FileClient" will be deprecated in future',
    '"HardDiskBackend" is the alias of "LocalBackend"',
)


@contextmanager
def quiet_imports() -> Iterator[None]:
    """What imports print and warn of comes after the block, without noise."""
    printed, caught = io.StringIO(), []
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            redirect_stdout(printed),
        ):
            warnings.simplefilter('always')  # filters act after the block
            yield
    finally:
        for each in caught:
            if not str(each.message).startswith(IMPORT_WARNINGS):
                warnings.warn_explicit(
                    each.message, each.category, each.filename, each.lineno
                )
        for line in printed.getvalue().splitlines():
            if line not in IMPORT_NOISE:
                print(line)


def quiet_warnings() -> None:
    """Hide warnings of dependencies that no user can act on."""
    for pattern in WARNING_NOISE:
        warnings.filterwarnings('ignore', message=pattern)


def is_for_people(record: logging.LogRecord) -> bool:
    """Whether a log record belongs on the console, too."""
    return not record.getMessage().startswith(LOG_NOISE)
