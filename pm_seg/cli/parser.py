"""Help that teaches, and how every tool ends.

Exit codes: 0 done, 1 failed (a file is missing, a download broke, ...),
2 wrong usage (the command line cannot be meant like that), 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

from ..core.presets import nearest

P = ParamSpec('P')
T = TypeVar('T')

WIDTH = 79
PACKAGE = Path(__file__).resolve().parents[1]


def make_parser(
    prog: str, description: str, *examples: tuple[str, str]
) -> argparse.ArgumentParser:
    """A parser whose help explains the tool and ends with examples.

    Args:
        prog (str): Name of the file in ``tools``.
        description (str): What it does; blank lines separate paragraphs.
        *examples (tuple[str, str]): What an example does, and its arguments.
    """
    paragraphs = [
        textwrap.fill(' '.join(paragraph.split()), WIDTH)
        for paragraph in description.split('\n\n')
    ]
    lines = ['examples:' if len(examples) > 1 else 'example:']
    for what, arguments in examples:
        lines.append(f'  # {what}')
        lines += _command(prog, arguments)
    lines += ['', 'exit codes: 0 done, 1 failed, 2 wrong usage']
    return argparse.ArgumentParser(
        prog=prog,
        description='\n\n'.join(paragraphs),
        epilog='\n'.join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _command(prog: str, arguments: str) -> list[str]:
    """The command in lines that fit, to be pasted into a shell."""
    parts: list[str] = []  # a flag and its values stay together
    for word in shlex.split(arguments):
        if parts and parts[-1][0] == '-' and word[0] != '-':
            parts[-1] += f' {shlex.quote(word)}'
        else:
            parts.append(shlex.quote(word))
    lines = [f'  python tools/{prog}']
    for part in parts:
        if len(lines[-1]) + 1 + len(part) + 2 > WIDTH:
            lines[-1] += ' \\'
            lines.append(f'      {part}')
        else:
            lines[-1] += f' {part}'
    return lines


def wrong_usage(message: str) -> NoReturn:
    """Say what is wrong with the command line and exit with 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def _explanation(error: BaseException | None) -> str | None:
    """Message of an error that pm_seg itself raised.

    Those say what was given, what is expected and how to mend it. mmengine
    wraps what is raised while it builds a module; the first one counts.
    """
    found = None
    while error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        file = trace.tb_frame.f_code.co_filename if trace else ''
        inside = PACKAGE in Path(file).parents
        if isinstance(error, (ValueError, RuntimeError)) and inside:
            found = str(error)
        hidden = error.__suppress_context__  # raised "from None"
        error = error.__cause__ or (None if hidden else error.__context__)
    return found


def _misspelt(error: Exception) -> str | None:
    """What is wrong if mmengine could not build a module from its config:
    an option its class has not, or a type that nobody registered.
    """
    trace, built = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_name == 'build_from_cfg':
            built = trace.tb_frame.f_locals
        trace = trace.tb_next
    if built is None:
        return None
    if isinstance(error, KeyError) and 'is not in the' in str(error):
        kind, registry = built['obj_type'], built['registry']
        close = get_close_matches(kind, registry.module_dict, 1)
        guess = f'did you mean {close[0]!r}?' if close else 'is it imported?'
        return f'type={kind!r} is in no registry of {registry.name}s; {guess}'
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found and found[1] in built.get('args', ()):
        name, built_class = found[1], built['obj_cls']
        known = [
            option
            for base in getattr(built_class, '__mro__', [built_class])
            for option in inspect.signature(base.__init__).parameters
            if option not in ('self', 'args', 'kwargs')
        ]
        return (
            f'{built_class.__name__} has no option {name}='
            f'{built["args"][name]!r}; {nearest(name, dict.fromkeys(known))}'
        )
    return None


def command(
    on_interrupt: str = '',
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator of a tool's ``main``: it ends with a message.

    Ctrl-C gives a line and exit code 130; an error of pm_seg, about a config,
    a checkpoint or a target that cannot be, its message and no traceback;
    a misspelt option or type of a config, what there is.
    ``PM_SEG_TRACEBACK=1`` in the environment shows the traceback.

    Args:
        on_interrupt (str): What is left, or how to go on.
    """

    def decorate(main: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return main(*args, **kwargs)
            except KeyboardInterrupt:
                text = f'Interrupted. {on_interrupt}'.strip()
                print(f'\n{text}', file=sys.stderr)
                raise SystemExit(130) from None
            except (ValueError, RuntimeError, TypeError, KeyError) as error:
                message = _explanation(error) or _misspelt(error)
                if message is None or os.environ.get('PM_SEG_TRACEBACK'):
                    raise
                raise SystemExit(
                    f'Error: {message}\n(PM_SEG_TRACEBACK=1 shows where)'
                ) from None
            except BrokenPipeError:
                # The reader of a pipe, head for example, has seen enough.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, sys.stdout.fileno())
                raise SystemExit(1) from None

        return run

    return decorate
