"""Registration with the OpenMMLab packages that are installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

PACKAGES = tuple(
    name for name in ('mmseg', 'mmpretrain') if find_spec(name) is not None
)


def register(kind: str) -> Callable[[type], type]:
    """Class decorator: register with mmseg and, if installed, mmpretrain.

    For what serves both; their registries do not look into each other.

    Args:
        kind (str): Name of the registry, for example 'HOOKS'.
    """

    def decorator(cls: type) -> type:
        for package in PACKAGES:
            registry = getattr(import_module(f'{package}.registry'), kind)
            registry.register_module(module=cls)
        return cls

    return decorator
