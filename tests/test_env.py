"""The report of python -m pm_seg.env."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_tool

from pm_seg import __version__, env


def test_report() -> None:
    result = run_tool('-m', 'pm_seg.env', check=False, fresh=True)
    text = result.stdout
    mixed = 'MIXED' in text
    assert result.returncode == int(mixed), result.stderr
    rows = dict(
        line.strip().split(maxsplit=1)
        for line in text.splitlines()
        if len(line.split()) > 1
    )
    assert rows['pm_seg'].startswith(__version__)
    assert rows['torch'] == torch.__version__
    for name in ('mmcv', 'mmengine', 'mmseg'):
        assert rows[name].endswith(')'), f'{name} is there and imports'
    for item in ('python', 'CPU', 'GPU', 'threads', 'ONNX'):
        assert f'\n{item} ' in f'\n{text}'
    assert 'its classes register' in text
    assert not result.stderr


def test_mixed_stack_is_said_loudly(monkeypatch, capsys) -> None:
    versions = {'onedl-mmcv': '2.3', 'mmcv': '2.1', 'mmengine': '0.10.7'}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, 'version', version)
    monkeypatch.setattr(env, '_torch', list)
    assert env.main() == 1
    text = capsys.readouterr().out
    assert 'MIXED: onedl-mmcv, mmcv, mmengine' in text
    assert '2.3 (onedl-mmcv), 2.1 (mmcv)' in text
    assert 'MIXED STACK: onedl-mmcv and mmcv own the same files' in text


def test_it_speaks_where_the_stack_is_broken(tmp_path: Path) -> None:
    """Each package raises when imported; the report says so."""
    for name in ('mmcv', 'mmengine', 'mmseg', 'mmpretrain', 'torch'):
        (tmp_path / f'{name}.py').write_text("raise OSError('broken here')")
    paths = f'{tmp_path}:{ROOT}'
    result = run_tool(
        '-m', 'pm_seg.env', env={'PYTHONPATH': paths}, fresh=True
    )
    assert result.stdout.count('OSError: broken here') >= 3
    assert 'torch' in result.stdout and 'pm_seg' in result.stdout


def test_commit(tmp_path: Path) -> None:
    assert env.commit(tmp_path) == ''
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c']
    for arguments in (
        ['user.email=a@b', 'init', '-q'],
        ['user.email=a@b', 'commit', '-q', '--allow-empty', '-m', 'x'],
    ):
        try:
            subprocess.run([*git, *arguments], check=True)
        except FileNotFoundError:
            pytest.skip('git is not installed')
    name = env.commit(tmp_path)
    assert name.startswith('commit ') and not name.endswith('dirty')
    (tmp_path / 'file').touch()
    subprocess.run(['git', '-C', str(tmp_path), 'add', 'file'], check=True)
    assert env.commit(tmp_path) == f'{name}-dirty'
