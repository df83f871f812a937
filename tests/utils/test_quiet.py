"""Noise is dropped, everything else is not."""

from __future__ import annotations

import logging
import warnings

import pytest

from pm_seg.utils.quiet import LOG_NOISE, is_for_people, quiet_imports


def test_imports_are_quiet(capsys) -> None:
    with quiet_imports():
        print('Could not import OneDL')
        print('Could not import something that matters')
        warnings.warn('Fail to import ext', stacklevel=1)
    out = capsys.readouterr()
    assert out.out == 'Could not import something that matters\n'
    with (
        pytest.warns(UserWarning, match='matters'),
        quiet_imports(),
    ):
        warnings.warn('this one matters', stacklevel=1)


def test_nothing_is_lost_if_an_import_fails(capsys) -> None:
    with pytest.raises(ImportError), quiet_imports():
        print('a hint')
        raise ImportError
    assert capsys.readouterr().out == 'a hint\n'


def test_log_records() -> None:
    def record(text: str) -> logging.LogRecord:
        return logging.LogRecord('a', logging.INFO, '', 0, text, (), None)

    for noise in LOG_NOISE:
        assert not is_for_people(record(f'{noise} and so on'))
    for text in ('Iter(train) [1/2]', 'Config, environment and log: x.log'):
        assert is_for_people(record(text))
