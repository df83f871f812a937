"""Training state loads without unsafe unpickling; code does not."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer

from pm_seg.utils.checkpoints import (
    CheckpointError,
    load_from_local,
    read_checkpoint,
)


def test_history_buffers_load(tmp_path: Path) -> None:
    history = HistoryBuffer()
    for value in (1.0, 3.0):
        history.update(value)
    torch.save(dict(loss=history), tmp_path / 'state.pth')
    if hasattr(torch.serialization, 'safe_globals'):  # torch >= 2.5
        with torch.serialization.safe_globals([HistoryBuffer]):
            pass  # what mmengine does when it loads; drops the type
    loaded = read_checkpoint(tmp_path / 'state.pth')['loss']
    assert loaded.mean() == 2.0


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class ReadAttribute:
    def __reduce__(self):
        return getattr, (torch.Tensor, 'numpy')


def test_arguments_of_training_scripts_load(tmp_path: Path) -> None:
    file = tmp_path / 'arguments.pth'
    torch.save(dict(x=argparse.Namespace(y=1)), file)
    assert read_checkpoint(file)['x'].y == 1


def test_code_is_refused(tmp_path: Path) -> None:
    unknown = SimpleNamespace(x=1)  # harmless, but no weights
    for payload in (Attack(tmp_path / 'pwned'), ReadAttribute(), unknown):
        torch.save(dict(x=payload), tmp_path / 'bad.pth')
        with pytest.raises(UnpicklingError):
            read_checkpoint(tmp_path / 'bad.pth')
        with pytest.raises(CheckpointError, match='more than weights'):
            load_from_local(str(tmp_path / 'bad.pth'))
    assert not (tmp_path / 'pwned').exists()
