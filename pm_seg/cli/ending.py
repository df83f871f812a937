"""How every tool ends.

Exit codes: 0 done, 1 failed (a file is missing, a download broke, ...),
2 wrong usage (the command line cannot be meant like that), 130 interrupted.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from traceback import extract_tb, walk_tb
from typing import NoReturn

from ..core.presets import nearest
from ..utils.quiet import quiet_warnings

PACKAGE = Path(__file__).resolve().parents[1]


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
        trace = extract_tb(error.__traceback__)
        inside = trace and PACKAGE in Path(trace[-1].filename).parents
        if isinstance(error, (ValueError, RuntimeError)) and inside:
            found = str(error)
        hidden = error.__suppress_context__  # raised "from None"
        error = error.__cause__ or (None if hidden else error.__context__)
    return found


def _misspelt(error: Exception) -> str | None:
    """A type of a config that is in no registry, or an option of no class."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    calls = [f for f in frames if f.f_code.co_name == 'build_from_cfg']
    if not calls:
        return None
    built = calls[-1].f_locals
    if isinstance(error, KeyError) and 'is not in the' in str(error):
        kind, registry = built['obj_type'], built['registry']
        close = get_close_matches(kind, registry.module_dict, 1)
        guess = f'did you mean {close[0]!r}?' if close else 'is it imported?'
        return f'type={kind!r} is in no registry of {registry.name}s; {guess}'
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if found and found[1] in built.get('args', ()):
        name, cls = found[1], built['obj_cls']
        known = dict.fromkeys(
            option
            for base in getattr(cls, '__mro__', ())
            for option in inspect.signature(base.__init__).parameters
            if option not in ('self', 'args', 'kwargs')
        )
        given = f'{name}={built["args"][name]!r}'
        return f'{cls.__name__} has no option {given}; {nearest(name, known)}'
    return None


@contextmanager
def command(on_interrupt: str = '') -> Iterator[None]:
    """Decorator of a tool's ``main``: it ends with a message.

    Ctrl-C gives one, with ``on_interrupt``, and exit code 130; an error of
    pm_seg its message and no traceback; a misspelt option or type of a config,
    what there is. ``PM_SEG_TRACEBACK=1`` in the environment shows the
    traceback. Warnings that no user can act on are hidden.
    """
    quiet_warnings()
    try:
        yield
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
