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

from mmengine.hooks import Hook

TARGET = Path(__file__).resolve().parents[1] / 'docs' / 'api.md'

#: Sections of the page: title, module, and names (None for its ``__all__``).
SECTIONS = (
    (
        'Without a config',
        'pm_seg.api',
        ('compress_model', 'make_compressible'),
    ),
    (
        'mmseg',
        'pm_seg.models',
        (
            'PMVisionTransformer',
            'PMTimmVisionTransformer',
            'PMSegmenterMaskTransformerHead',
            'DistilledEncoderDecoder',
        ),
    ),
    ('Heads of your own', 'pm_seg.models.features', ('FeatureMaps',)),
    (
        'mmpretrain',
        'pm_seg.models.backbones.pretrain_vit',
        ('PMVisionTransformer', 'PMDistilledVisionTransformer'),
    ),
    (
        'mmpretrain: other backbones',
        'pm_seg.models.backbones.pretrain_vit',
        ('PMDeiT3', 'PMBEiTViT', 'PMViTEVA02'),
    ),
    (
        'mmpretrain: classifiers',
        'pm_seg.models.classifiers',
        ('DistilledImageClassifier',),
    ),
    ('Compression and training', 'pm_seg.engine', None),
    ('Datasets', 'pm_seg.datasets', None),
    (
        'Core: tokens that merge over depth',
        'pm_seg.core',
        (
            'make_compressor',
            'ProgressiveCompressor',
            'match',
            'match_windows',
            'Merge',
            'TokenGroups',
            'ImportanceFitter',
        ),
    ),
    (
        "Core: the paper's groups by position",
        'pm_seg.core',
        (
            'StaticCompressor',
            'TokenMap',
            'DenseTokenMap',
            'ScoreRecorder',
            'value_gradient_scores',
            'normalise_scores',
            'count_tokens',
            'row_window_groups',
            'group_weights',
        ),
    ),
    (
        'Core: what all kinds share',
        'pm_seg.core',
        (
            'Compressor',
            'EncoderShape',
            'Layer',
            'LayerCost',
            'LayerLoad',
            'Outputs',
            'GroupRecorder',
            'run_dense',
        ),
    ),
)

HEADER = """# Python interface

Written by `python tools/make_api_docs.py` from the docstrings; do not edit.
Classes with a registry need no import in a config: they are `type='...'`.
"""

_SECTION = re.compile(
    r'^(Args|Attributes|Returns|Raises|Yields|Example|Examples):$'
)
_ROLE = re.compile(r':(\w+):`~?([^`]+)`')


def _target(match: re.Match) -> str:
    """A role as code: modules in full, methods with their class."""
    role, name = match.groups()
    parts = {'mod': 0, 'meth': 2, 'attr': 2}.get(role, 1)
    return f'`{".".join(name.split(".")[-parts:])}`'


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
        if text and not getattr(obj, '_is_protocol', False):
            lines += ['```python', *_wrapped(text), '```', '']
    return lines + _docstring(inspect.getdoc(obj) or '')


def _wrapped(signature: str) -> list[str]:
    """A signature, one parameter in each line if it is long."""
    signature = re.sub(r"(: |-> )'([^']*)'", r'\1\2', signature)
    signature = re.sub(r"ForwardRef\('([^']*)'\)", r'\1', signature)
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
    text = _ROLE.sub(_target, text)
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
    """Documented public methods and properties a class defines itself.

    None of hooks: it is mmengine that calls them.
    """
    found = []
    if issubclass(cls, Hook):
        return found
    for name, value in vars(cls).items():
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        known = inspect.isfunction(value) or isinstance(value, property)
        public = not name.startswith('_') or name == '__call__'
        if known and public and value.__doc__:
            found.append((name, value))
    return found


def page() -> str:
    """The whole page."""
    lines = [HEADER]
    shown_names: dict[str, set[str]] = {}
    for title, module_name, names in SECTIONS:
        module = importlib.import_module(module_name)
        shown_names.setdefault(module_name, set()).update(
            names or module.__all__
        )
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
    for module_name, names in shown_names.items():
        module = importlib.import_module(module_name)
        public = {
            name
            for name in getattr(module, '__all__', ())
            if callable(getattr(module, name))
        }
        if public - names:
            raise SystemExit(
                f'{module_name}: {sorted(public - names)} are public and in '
                'no section; add them to SECTIONS'
            )
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
