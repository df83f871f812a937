"""The kinds of compression a ``compression`` dict can ask for, by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .compressor import Compressor, EncoderShape
from .progressive import ProgressiveCompressor
from .static import StaticCompressor

_PEER = dict(step=0.0, between=True, restore='replace')
_TOME = dict(schedule='constant', compare='keys')
_ALGM = dict(schedule='local_global', compare='tokens', size_aware=False)

#: Class, and the options that make it the method of this name.
PRESETS: dict[str, tuple[Callable[..., Compressor], dict[str, Any]]] = {
    'pm': (ProgressiveCompressor, {}),
    'paper': (StaticCompressor, {}),
    'tome': (ProgressiveCompressor, {**_PEER, **_TOME}),
    'algm': (ProgressiveCompressor, {**_PEER, **_ALGM}),
}

#: What suits classifiers, whose class token reads all others to the end.
CLASSIFICATION = dict(
    compare='keys', power=1.0, first=2, step=0.0, balance=0.5
)


def make_compressor(
    compression: Mapping[str, Any],
    shape: EncoderShape,
    defaults: Mapping[str, Any] = {},
) -> Compressor:
    """Build the compressor that a ``compression`` dict describes.

    Args:
        compression (dict): ``type``, a key of ``PRESETS`` (default 'pm'), and
            options of its class.
        shape (EncoderShape): The transformer.
        defaults (dict): Options of 'pm' where ``compression`` is silent.

    Raises:
        ValueError: On an unknown type or option, with the nearest name there
            is, or a value out of range.
    """
    options = dict(compression)
    kind = options.pop('type', 'pm')
    if kind not in PRESETS:
        raise ValueError(
            f'compression type={kind!r} is unknown; {nearest(kind, PRESETS)}'
        )
    build, preset = PRESETS[kind]
    known = list(inspect.signature(build).parameters)[1:]
    for name in options:
        if name not in known:
            raise ValueError(
                f'compression has an unknown option {name}='
                f'{options[name]!r}; {nearest(name, known)} of type={kind!r}'
            )
    start = defaults if kind == 'pm' else preset
    return build(shape, **{**start, **options})


def nearest(name: Any, known: Iterable[str]) -> str:
    """'did you mean x?' if one is near, and all there are."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, 1)
    guess = f'did you mean {close[0]!r}? ' if close else ''
    return f'{guess}choose one of {", ".join(known)}'
