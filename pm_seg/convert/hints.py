"""What is known of a model besides its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .sources import ConversionError, Source


@dataclass(frozen=True)
class Hints:
    """What weights do not say about a model.

    Attributes:
        num_heads (int, optional): Of the encoder.
        img_size (tuple[int, int], optional): Height and width the position
            embedding is for.
        normalization (str, optional): 'vit' or 'imagenet'.
        name (str): Of the file; 'deit' or 'mae' in it tell the
            normalization.
        facts, variant, pretrained_cfg: See :class:`~.sources.Source`.
    """

    num_heads: int | None = None
    img_size: tuple[int, int] | None = None
    normalization: str | None = None
    name: str = ''
    facts: dict[str, Any] = field(default_factory=dict)
    variant: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source, **given: Any) -> Hints:
        """Hints of a file; what is given (not None) takes precedence."""
        found = {k: v for k, v in vars(source).items() if k != 'state'}
        found.update((k, v) for k, v in given.items() if v is not None)
        return cls(**found).completed(source.facts, 'num_heads', 'img_size')

    def completed(
        self, section: Mapping[str, Any], heads: str, size: str
    ) -> Hints:
        """With heads and image size of a description, if unknown yet."""
        changes = {}
        if self.num_heads is None and section.get(heads) is not None:
            changes['num_heads'] = int(number(section, heads))
        if self.img_size is None and section.get(size) is not None:
            changes['img_size'] = pair(section[size])
        return replace(self, **changes)


def number(
    section: Mapping[str, Any], name: str, default: float | None = None
) -> float | None:
    """A number of a description, ``default`` where there is none.

    Raises:
        ConversionError: If it is something else.
    """
    value = section.get(name)
    if value is None:
        return default
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConversionError(
            f'{name}={value!r} in the input is not a number; correct it or '
            'remove it'
        ) from None


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of a number, a sequence or a tensor.

    Raises:
        ConversionError: If it is neither one number > 0 nor two.
    """
    try:
        numbers = [int(n) for n in torch.as_tensor(value).flatten()]
    except (TypeError, ValueError, RuntimeError):
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise ConversionError(
            f'got size {value}; expected one number > 0, or height and width'
        )
    return numbers[0], numbers[-1]
