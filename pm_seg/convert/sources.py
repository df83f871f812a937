"""Reading foreign checkpoints, and what is known of them, without code."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ..utils.checkpoints import CheckpointError, explained, read_checkpoint

#: Where training scripts keep the weights among other things, first wins.
_NESTED = ('state_dict', 'model', 'model_state_dict', 'sd')
#: Prefixes that wrappers put before every key.
_WRAPPERS = ('module.', '_orig_mod.')
#: Archives of arrays may hold weights below this prefix, the rest beside it.
_ARRAYS = 'sd/'
#: Entries that describe a model and are no weights of it.
_FACTS = ('channels', 'img_size', 'keep', 'merge_list', 'merged_tokens',
          'n_cls', 'num_heads', 'patch_size', 'prune', 'scores')  # fmt: skip


@dataclass(frozen=True)
class Hints:
    """What weights do not say about a model."""

    num_heads: int | None = None  # of the encoder
    img_size: tuple[int, int] | None = None  # of the position embedding
    normalization: str | None = None  # 'vit' or 'imagenet'
    name: str = ''  # of the file; 'deit' or 'mae' in it tell the normalization
    #: What else the file says, for example ``num_heads`` and ``scores``.
    facts: dict[str, Tensor] = field(default_factory=dict)
    #: ``variant.yml`` beside the file, else empty.
    variant: dict[str, Any] = field(default_factory=dict)
    #: ``mean`` and ``std`` in timm's ``config.json`` beside it, else empty.
    pretrained_cfg: dict[str, list[float]] = field(default_factory=dict)

    def completed(
        self, section: Mapping[str, Any], heads: str, size: str
    ) -> Hints:
        """With heads and image size of a description, if unknown yet."""
        num_heads, img_size = self.num_heads, self.img_size
        if num_heads is None and section.get(heads) is not None:
            num_heads = int(number(section, heads))
        if img_size is None and section.get(size) is not None:
            img_size = pair(section[size])
        return replace(self, num_heads=num_heads, img_size=img_size)


def number(
    section: Mapping[str, Any], name: str, default: float | None = None
) -> float | None:
    """A number of a description, ``default`` where there is none."""
    value = section.get(name)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(
            f'{name}={value!r} in the input is not a number; correct it or '
            'remove it'
        ) from None


def pair(value: Any) -> tuple[int, int]:
    """(height, width) of one number > 0, or of a sequence or tensor of two."""
    try:
        numbers = [int(n) for n in torch.as_tensor(value).flatten()]
    except (TypeError, ValueError, RuntimeError):
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise CheckpointError(
            f'got size {value}; expected one number > 0, or height and width'
        )
    return numbers[0], numbers[-1]


def read_source(
    path: str | Path, **given: Any
) -> tuple[dict[str, Tensor], Hints]:
    """Read a .pth, .npz or .safetensors file and what lies beside it.

    What is ``given`` of :class:`Hints` takes precedence unless it is None.

    Returns:
        tuple[dict[str, Tensor], Hints]: Weights by name, in float32 on the
        CPU, and what is known besides.

    Raises:
        CheckpointError: If the file is missing, damaged, holds code or no
            weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f'{path} is not a file; give the path of a checkpoint (.pth, '
            '.npz or .safetensors)'
        )
    content = _read(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'{path.name} holds a {type(content).__name__}; expected a dict '
            'of tensors by name'
        )
    weights = _find_weights(content)
    state = _clean(weights)
    if not state:
        found = ', '.join(map(str, list(content)[:8])) or 'nothing'
        raise CheckpointError(
            f'{path.name} holds no weights: got {found}; expected tensors by '
            f'name, or a dict of them below one of {_NESTED}'
        )
    for key, value in state.items():
        if not value.isfinite().all():
            raise CheckpointError(
                f'{path.name}: {key} contains NaN or inf; the file is '
                'damaged or its training diverged: use another one'
            )
    facts = {}
    for key, value in {**content, **weights}.items():
        if key not in _FACTS or value is None:
            continue
        try:
            facts[key] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f'{path.name}: entry {key} is a {type(value).__name__}, '
                'expected a number or a list of them; remove it to do without'
            ) from error
    hints = Hints(
        name=path.name,
        facts=facts,
        variant=_read_variant(path.with_name('variant.yml')),
        pretrained_cfg=_read_pretrained_cfg(path.with_name('config.json')),
    )
    given = {k: v for k, v in given.items() if v is not None}
    return state, replace(hints, **given).completed(
        facts, 'num_heads', 'img_size'
    )


def _find_weights(content: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """What is below one of ``_NESTED``, below ``sd/``, or all there is."""
    archived = {
        key.removeprefix(_ARRAYS): value
        for key, value in content.items()
        if str(key).startswith(_ARRAYS)
    }
    nested = [content.get(key) for key in _NESTED]
    nested = [x for x in nested if isinstance(x, Mapping) and x]
    return archived or (nested[0] if nested else content)


def _clean(weights: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The tensors, as float32, without prefixes of wrappers."""
    state = {}
    for key, value in weights.items():
        if isinstance(value, Tensor) and key not in _FACTS:
            value = value.detach().contiguous()
            floats = value.is_floating_point()
            state[str(key)] = value.float() if floats else value
    for prefix in _WRAPPERS:
        if all(key.startswith(prefix) for key in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _read(path: Path) -> Any:
    """Content of a file, by its suffix."""
    suffix = path.suffix.lower()
    if suffix == '.safetensors' and find_spec('safetensors') is None:
        raise CheckpointError(
            f'{path.name} needs the safetensors package to be read: pip '
            'install safetensors'
        )
    save = "torch.save(model.state_dict(), 'weights.pth')"
    with explained(path, f'save its weights alone: {save}'):
        if suffix == '.npz':
            return _read_npz(path)
        if suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(path)
        return read_checkpoint(path)


def _read_npz(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile('not a zip file')
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return {
        key: torch.from_numpy(value)
        for key, value in arrays.items()
        if value.dtype.kind in 'fiub'  # no names, dates, ...
    }


class _VariantLoader(yaml.SafeLoader):
    """Safe YAML and tuples, which the Segmenter repository writes."""


_VariantLoader.add_constructor(
    'tag:yaml.org,2002:python/tuple',
    lambda loader, node: tuple(loader.construct_sequence(node)),
)


def _read_variant(path: Path) -> dict[str, Any]:
    """The Segmenter repository's description of a run, if it is there."""
    if not path.is_file():
        return {}
    try:
        content = yaml.load(path.read_text(), _VariantLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(
            f'{path.name} beside the checkpoint cannot be read as plain data '
            f'({error}); restore it, or move it away to do without'
        ) from error
    return content if isinstance(content, dict) else {}


def _read_pretrained_cfg(path: Path) -> dict[str, list[float]]:
    """Pixel mean and standard deviation of timm's description, if any."""
    try:
        found = json.loads(path.read_text())['pretrained_cfg']
        return {key: [float(x) for x in found[key]] for key in ('mean', 'std')}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none, or some other program's file
