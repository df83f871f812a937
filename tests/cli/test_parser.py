"""Help, exit codes and interruptions, the same for all tools."""

from __future__ import annotations

import importlib
import re
import shlex
from types import ModuleType

import pytest
from helpers import ROOT

from pm_seg.cli.parser import command, make_parser, wrong_usage
from pm_seg.core.compressor import check_share

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


def test_long_examples_are_wrapped_for_a_shell() -> None:
    words = [f'--option-{i} "value {i}"' for i in range(9)]
    text = make_parser('tool.py', 'What.', ('why', ' '.join(words)))
    lines = text.format_help().splitlines()
    first = next(i for i, line in enumerate(lines) if 'python' in line)
    block = '\n'.join(lines[first : lines.index('', first)])
    assert max(map(len, block.splitlines())) < 80
    assert shlex.split(block.replace('\\\n', ''))[2:] == shlex.split(
        ' '.join(words)
    )


def ending(main, capsys) -> tuple[object, str]:
    with pytest.raises(SystemExit) as error:
        main()
    return error.value.code, capsys.readouterr().err


def test_interruption(capsys) -> None:
    @command('Nothing was written.')
    def main() -> None:
        raise KeyboardInterrupt

    code, err = ending(main, capsys)
    assert code == 130 and err == '\nInterrupted. Nothing was written.\n'


def test_own_errors_are_messages(capsys, monkeypatch) -> None:
    @command()
    def main() -> None:
        try:
            check_share('keep', 2.0)
        except ValueError as error:  # as mmengine's registries do
            raise ValueError(f'class X in file: {error}') from error

    code, _ = ending(main, capsys)
    assert code.startswith('Error: keep=2.0') and 'class X' not in code
    monkeypatch.setenv('PM_SEG_TRACEBACK', '1')
    with pytest.raises(ValueError, match='class X'):
        main()


def test_other_errors_keep_their_traceback() -> None:
    @command()
    def main() -> None:
        int('x')

    with pytest.raises(ValueError, match='invalid literal'):
        main()


def test_wrong_usage(capsys) -> None:
    code, err = ending(lambda: wrong_usage('--a needs --b'), capsys)
    assert code == 2 and err == '--a needs --b\n'


def test_what_main_returns_is_kept() -> None:
    assert command()(lambda: {'mIoU': 1.0})() == {'mIoU': 1.0}
