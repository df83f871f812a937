"""Help and usage, the same for all tools."""

from __future__ import annotations

import importlib
import re
import shlex
from types import ModuleType

import pytest
from helpers import ROOT

#: Scripts whose help is argparse's own.
PLAIN = {
    'make_api_docs',
    'lab/mutation_check',
    'lab/faults',
    'lab/gpu_report',  # shown as tools/gpu_report.py
    'lab/gpu_rows',
}
TOOLS = sorted(
    str(path.relative_to(ROOT / 'tools').with_suffix(''))
    for path in (ROOT / 'tools').glob('**/*.py')
    if 'parse_args' in path.read_text() or path.parent.name == 'tools'
)
TOOLS = [tool for tool in TOOLS if tool not in PLAIN]


def module_of(tool: str) -> ModuleType:
    """What a script runs: the package's module, or itself."""
    name = tool.rpartition('/')[2]
    inside = (ROOT / f'pm_seg/cli/{name}.py').is_file()
    return importlib.import_module(f'pm_seg.cli.{name}' if inside else name)


def help_of(tool: str, capsys, monkeypatch) -> str:
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit) as error:
        module_of(tool).main(['--help'])
    assert error.value.code == 0
    return capsys.readouterr().out


def test_tools_of_users_and_of_the_laboratory_are_found() -> None:
    assert {'train', 'benchmark', 'lab/growth', 'lab/camvid_table'} <= set(
        TOOLS
    )


@pytest.mark.parametrize('tool', TOOLS)
def test_help_teaches(tool: str, capsys, monkeypatch) -> None:
    text = help_of(tool, capsys, monkeypatch)
    assert '\x1b' not in text
    assert max(map(len, text.splitlines())) < 80
    assert 'exit codes: 0 done, 1 failed, 2 wrong usage' in text
    shown = set(re.findall(r'^  (--[\w-]+)', text, re.M))
    for flag in shown:  # each has an explanation
        line = text[text.index(f'  {flag}') :].split('\n  -')[0]
        assert len(line.split()) > 2, line


@pytest.mark.parametrize('tool', TOOLS)
def test_examples_are_understood(tool: str, capsys, monkeypatch) -> None:
    """Pasted into a shell, the parser takes them and they name real files."""
    text = help_of(tool, capsys, monkeypatch).replace('\\\n', ' ')
    lines = text[text.index('\nexample') :].splitlines()
    commands = [shlex.split(line) for line in lines if ' python ' in line]
    assert 1 <= len(commands) <= 3
    for python, script, *arguments in commands:
        assert (python, script) == ('python', f'tools/{tool}.py')
        module_of(tool).parse_args(arguments)
        for word in arguments:
            if word.startswith('configs/'):
                assert (ROOT / word).is_file()


@pytest.mark.parametrize('tool', TOOLS)
def test_unknown_flags_are_wrong_usage(tool: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        module_of(tool).main(['--no-such-flag'])
    assert error.value.code == 2
    assert f'{tool}.py: error' in capsys.readouterr().err
