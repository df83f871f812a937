"""Loading checkpoints without running code from them."""

from __future__ import annotations

import argparse
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

#: Torch's own switch for loading checkpoints with code in them.
TRUST = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'
#: Lines around torch's reason for refusing a file: advice to load unsafely.
_ADVICE = ('Weights only load failed', 'Please file', 'Check the',
           'To execute', '(1)', '(2)')  # fmt: skip
#: Reasons that mean that it holds more than data.
_CODE = re.compile(
    r'\bglobal\b|refusing|unrecognized function|unsupported class|Can only'
    '|allow_pickle',
    re.IGNORECASE,
)


class CheckpointError(RuntimeError):
    """A file that is no usable checkpoint: what is wrong, and a remedy."""


def _history_method(owner: type, name: str) -> object:
    """Stands in for ``getattr``, for the one class that needs it."""
    if owner is not HistoryBuffer or name.startswith('_'):
        raise UnpicklingError(f'refusing to read {name!r} of {owner!r}')
    return getattr(owner, name)


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """Stands in for ``_codecs.encode``, by which numpy saves its bytes."""
    if encoding != 'latin1':
        raise UnpicklingError(f'refusing to encode as {encoding!r}')
    return text.encode('latin1')


# The names they are looked up by; torch before 2.6 takes none beside them.
for _stand_in, _module, _name in (
    (_history_method, 'builtins', 'getattr'),
    (_latin1_bytes, '_codecs', 'encode'),
):
    _stand_in.__module__ = _module
    _stand_in.__name__ = _stand_in.__qualname__ = _name


def allow_training_state() -> None:
    """Let weights-only loading read what training scripts save beside them.

    mmengine's checkpoints hold logged scalars as ``HistoryBuffer`` with numpy
    arrays, other scripts' their arguments; unpickling a namespace sets
    attributes and nothing else. Code is still refused.
    """
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    kinds = np.float32, np.float64, np.int32, np.int64, np.uint32
    dtypes = [type(np.dtype(kind)) for kind in kinds]
    arrays = [np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar]
    own = [argparse.Namespace, HistoryBuffer, _history_method, _latin1_bytes]
    torch.serialization.add_safe_globals([*dtypes, *arrays, *own])


def read_checkpoint(path: str | Path, map_location: Any = 'cpu') -> Any:
    """Read a checkpoint, training state included, without running code.

    Args:
        path (str | Path): A file that ``torch.save`` wrote.
        map_location: See :func:`torch.load`. Defaults to 'cpu'.

    Raises:
        UnpicklingError: If it holds anything but data.
        BadZipFile: If it is damaged.
    """
    if zipfile.is_zipfile(path):  # not before torch 1.6
        _check_archive(path)
    # Anew each time: leaving a ``safe_globals`` block, as the maintained
    # mmengine does after every load, drops what was allowed before it.
    allow_training_state()
    return torch.load(path, map_location=map_location, weights_only=True)


def _check_archive(path: str | Path) -> None:
    """Compare the checksums of a zip file, which torch does not."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f'wrong checksum of {damaged}')


def trusted() -> bool:
    """Whether the user asked torch to load checkpoints with code."""
    return os.environ.get(TRUST, '0').lower() in ('1', 'y', 'yes', 'true')


@contextmanager
def explained(path: Path, trust: str) -> Iterator[None]:
    """Turn what a reader of a file raises into :class:`CheckpointError`.

    ``trust`` says what to do about code in it, if it is trusted.
    """
    try:
        yield
    except Exception as error:  # damaged bytes raise about anything
        lines = [line.strip() for line in str(error).splitlines()]
        lines = [x for x in lines if x and not x.startswith(_ADVICE)]
        why = lines[0] if lines else type(error).__name__
        why = why.removeprefix('WeightsUnpickler error: ').split('. ')[0]
        why = why.rstrip('. ')
        message = (
            f'cannot be read ({why}; it has {path.stat().st_size} bytes): it '
            f'is truncated, damaged or no {path.suffix or "checkpoint"} file; '
            'download or copy it again, or use an earlier one'
        )
        if _CODE.search(why):
            message = (
                f'holds more than weights ({why}). It was not loaded, because '
                'loading it could run code. If you trust where it comes from, '
                f'{trust}'
            )
        raise CheckpointError(f'checkpoint {path} {message}') from error


def load_from_local(filename: str, map_location: Any = None) -> dict:
    """Read a local checkpoint for mmengine, without code.

    The maintained mmengine reads everything, code included, if reading
    weights alone fails, and every mmengine runs a ``config`` it finds in the
    meta data when it resumes: that entry is dropped. Trusted files may hold
    code, see ``TRUST``.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is damaged, holds code or is no dict.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f'checkpoint {path} does not exist; give the path of a .pth file'
        )
    if path.suffix.lower() in ('.npz', '.safetensors'):
        raise CheckpointError(
            f'checkpoint {path} is no .pth file; make one of it with '
            'tools/convert_checkpoint.py'
        )
    with explained(path, f'set the environment variable {TRUST}=1'):
        if trusted():
            content = torch.load(path, map_location, weights_only=False)
        else:
            content = read_checkpoint(path, map_location)
    if not isinstance(content, Mapping) or not content:
        empty = '' if content else 'n empty'
        raise CheckpointError(
            f'checkpoint {path} holds a{empty} {type(content).__name__}; '
            'expected a dict of weights by name, or one with a state_dict, as '
            'torch.save(model.state_dict(), path) writes it'
        )
    meta = content.get('meta')
    if isinstance(meta, dict):
        meta.pop('config', None)
    return content


def use_safe_loading() -> None:
    """Let mmengine read local checkpoints with load_from_local."""
    CheckpointLoader.register_scheme('', load_from_local, force=True)


def latest_intact_checkpoint(
    work_dir: str | Path, finite: bool = False
) -> str | None:
    """The newest checkpoint of a run that was written to its end.

    A process killed while it saves, or a copy that broke off, leaves a
    truncated file behind; that one is passed over, with a line on stderr,
    and with ``finite`` those with NaN or inf in their weights.
    """
    found = [
        (int(match[1]), path)
        for path in Path(work_dir).glob('*.pth')
        if (match := re.fullmatch(r'(?:iter|epoch)_(\d+)', path.stem))
    ]
    for _, path in sorted(found, reverse=True):
        problem = _fault(path, finite)
        if problem is None:
            return str(path)
        print(f'Passing over {path}: {problem}', file=sys.stderr)
    return None


def _fault(path: Path, finite: bool) -> str | None:
    """What keeps a run from going on from a checkpoint, if anything."""
    try:
        _check_archive(path)
    except (zipfile.BadZipFile, OSError):
        return 'not a whole checkpoint'
    state = read_checkpoint(path).get('state_dict', {}) if finite else {}
    for key, value in state.items():
        if not torch.isfinite(value).all():
            return f'{key} contains NaN or inf'
    return None
