"""One run in a work directory at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pm_seg.utils import lock
from pm_seg.utils.lock import LOCK_NAME, WorkDirInUseError, work_dir_lock

HOLD = (
    'import runpy, sys; '
    'lock = runpy.run_path(sys.argv[1])["work_dir_lock"]\n'
    'with lock(sys.argv[2]): print("held", flush=True); sys.stdin.read()'
)


def hold(folder: Path) -> subprocess.Popen:
    """Another process that has the lock until its input ends."""
    process = subprocess.Popen(
        [sys.executable, '-c', HOLD, lock.__file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b'held\n'
    return process


def test_held_by_a_live_process(tmp_path: Path) -> None:
    with hold(tmp_path) as other:
        owner = (tmp_path / LOCK_NAME).read_text()
        with (
            pytest.raises(WorkDirInUseError) as error,
            work_dir_lock(tmp_path),
        ):
            pass
        assert f'process {other.pid} on' in str(error.value)
        assert '--work-dir' in str(error.value)
        assert (tmp_path / LOCK_NAME).read_text() == owner
        other.stdin.close()
        other.wait()
    with work_dir_lock(tmp_path):
        assert f'process {os.getpid()} ' in (tmp_path / LOCK_NAME).read_text()
    assert (tmp_path / LOCK_NAME).read_text() == ''


def test_left_by_a_killed_process(tmp_path: Path, capsys) -> None:
    with hold(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with work_dir_lock(tmp_path):
        pass
    err = capsys.readouterr().err
    assert 'Taking over' in err and f'process {other.pid} on' in err


def test_file_system_without_locks(tmp_path, monkeypatch, capsys) -> None:
    def lockf(*args) -> None:
        raise OSError(95, 'Operation not supported')

    monkeypatch.setattr(lock.fcntl, 'lockf', lockf)
    with work_dir_lock(tmp_path / 'new'):
        pass
    assert 'file system without locks' in capsys.readouterr().err
    monkeypatch.setattr(lock, 'fcntl', None)
    with work_dir_lock(tmp_path / 'new'):
        pass
