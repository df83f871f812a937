#!/usr/bin/env python
"""Write docs/api.md from the docstrings.

Usage: python tools/make_api_docs.py [--check]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import textwrap
from pathlib import Path

TARGET = Path(__file__).resolve().parents[1] / 'docs' / 'api.md'

#: Sections of the page: title, module, and names (None for its ``__all__``).
SECTIONS = (
    (
        'Without a config',
        'pm_seg.api',
        ('compress_model', 'make_compressible'),
    ),
    ('Backbones for mmseg', 'pm_seg.models', None),
    (
        'Backbones for mmpretrain',
        'pm_seg.models.backbones.pretrain_vit',
        ('PMVisionTransformer', 'PMDistilledVisionTransformer'),
    ),
    ('Classifiers', 'pm_seg.models.classifiers', None),
    ('Compression and training', 'pm_seg.engine', None),
    ('Datasets', 'pm_seg.datasets', None),
    ('Core: plain PyTorch', 'pm_seg.core', None),
)

HEADER = """# Python interface

Written by `python tools/make_api_docs.py` from the docstrings; do not edit.
Classes with a registry need no import in a config: they are `type='...'`.
"""

_SECTION = re.compile(
    r'^(Args|Attributes|Returns|Raises|Yields|Example|Examples):$'
)
_ROLE = re.compile(r':\w+:`~?([^`]+)`')


def render(obj: object, title: str, level: int) -> list[str]:
    """A heading, the signature and the docstring of one object."""
    lines = [f'{"#" * level} {title}', '']
    if isinstance(obj, property):
        lines += ['*property*', '']
    else:
        try:
            text = f'{title.rsplit(".", 1)[-1]}{inspect.signature(obj)}'
        except (TypeError, ValueError):
            text = ''
        if text:
            lines += ['```python', *_wrapped(text), '```', '']
    return lines + _docstring(inspect.getdoc(obj) or '')


def _wrapped(signature: str) -> list[str]:
    """A signature, one parameter in each line if it is long."""
    signature = re.sub(r"(: |-> )'([^']*)'", r'\1\2', signature)
    if len(signature) <= 79:
        return [signature]
    head, rest = signature.split('(', 1)
    body, tail = rest.rsplit(')', 1)
    parts, depth, start = [], 0, 0
    for index, char in enumerate(body):
        depth += (char in '([{') - (char in ')]}')
        if char == ',' and depth == 0:
            parts.append(body[start:index].strip())
            start = index + 1
    parts.append(body[start:].strip())
    return [f'{head}(', *(f'    {part},' for part in parts), f'){tail}']


def _docstring(text: str) -> list[str]:
    """Google sections as lists, roles and double backticks as code."""
    text = _ROLE.sub(lambda match: f'`{match[1].rsplit(".", 1)[-1]}`', text)
    text = text.replace('``', '`')
    lines, section, block = [], None, []

    def flush() -> None:
        body = textwrap.dedent('\n'.join(block)).strip('\n')
        if section and section.startswith('Example'):
            lines.extend(['```python', *body.splitlines(), '```', ''])
        elif section:
            single = section in ('Returns', 'Yields')
            entries = [body] if single else re.split(r'\n(?=\S)', body)
            for entry in entries:
                entry = re.sub(r'\s+', ' ', entry).strip()
                name, colon, rest = entry.partition(': ')
                name = re.sub(r'^[^(]*[^( ]', r'`\g<0>`', name)
                lines.append(f'- {name}: {rest}' if colon else f'- {entry}')
            lines.append('')
        else:
            body = re.sub(r'::$', ':', body, flags=re.M)
            lines.extend([*body.splitlines(), ''])
        block.clear()

    for line in text.splitlines():
        match = _SECTION.match(line)
        if match:
            flush()
            section = match[1]
            lines.extend([f'{section}', ''])
        elif section and line and not line.startswith(' '):
            flush()
            section = None
            block.append(line)
        else:
            block.append(line)
    flush()
    while lines and not lines[-1]:
        lines.pop()
    return [*lines, '']


def members(cls: type) -> list[tuple[str, object]]:
    """Documented public methods and properties a class defines itself."""
    found = []
    for name, value in vars(cls).items():
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        known = inspect.isfunction(value) or isinstance(value, property)
        if known and not name.startswith('_') and value.__doc__:
            found.append((name, value))
    return found


def page() -> str:
    """The whole page."""
    lines = [HEADER]
    for title, module_name, names in SECTIONS:
        module = importlib.import_module(module_name)
        shown = module_name.removesuffix('.api')
        lines += [f'## {title}', '', f'`{shown}`', '']
        for name in names or module.__all__:
            obj = getattr(module, name)
            if not (inspect.isclass(obj) or inspect.isfunction(obj)):
                continue
            lines += render(obj, name, 3)
            if inspect.isclass(obj):
                for member, value in members(obj):
                    lines += render(value, f'{name}.{member}', 4)
    return '\n'.join(lines).rstrip() + '\n'


def main(argv: list[str] | None = None) -> None:
    """Write the page, or fail if it is out of date."""
    parser = argparse.ArgumentParser(
        prog='make_api_docs.py', description='Write docs/api.md.'
    )
    parser.add_argument(
        '--check', action='store_true', help='write nothing, fail if outdated'
    )
    args = parser.parse_args(argv)
    text = page()
    if not args.check:
        TARGET.write_text(text)
        print(f'Wrote {TARGET}')
    elif not TARGET.exists() or TARGET.read_text() != text:
        raise SystemExit(
            f'{TARGET} is out of date; run python tools/make_api_docs.py'
        )


if __name__ == '__main__':
    main()
