"""Reading foreign checkpoints without running code from them."""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from ..utils.checkpoints import UnreadableError, explained, read_whole

#: Where training scripts keep the weights among other things, first wins.
_NESTED = ('state_dict', 'model', 'model_state_dict', 'sd')
#: Prefixes that wrappers put before every key.
_WRAPPERS = ('module.', '_orig_mod.')
#: Archives of arrays may hold weights below this prefix, the rest beside it.
_ARRAYS = 'sd/'
#: Entries that describe a model and are no weights of it.
_FACTS = ('channels', 'img_size', 'keep', 'merge_list', 'merged_tokens',
          'n_cls', 'num_heads', 'patch_size', 'prune', 'scores')  # fmt: skip


class ConversionError(ValueError):
    """Input that cannot be converted: what was got, expected, and a remedy."""


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was found.

    Attributes:
        state (dict[str, Tensor]): Weights by name, float32.
        facts (dict[str, Tensor]): What else the file says about the model,
            for example ``num_heads``, ``scores``, ``channels``.
        variant (dict): ``variant.yml`` beside the file, else empty.
        pretrained_cfg (dict): ``mean`` and ``std`` in timm's ``config.json``
            beside the file, else empty.
    """

    state: dict[str, Tensor]
    facts: dict[str, Tensor] = field(default_factory=dict)
    variant: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)


def read_source(path: str | Path) -> Source:
    """Read a .pth, .npz or .safetensors file and what lies beside it.

    Args:
        path (str | Path): The checkpoint.

    Returns:
        Source: Its weights, in float32 on the CPU.

    Raises:
        ConversionError: If the file is missing, damaged, holds code or no
            weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(
            f'{path} is not a file; give the path of a checkpoint (.pth, '
            '.npz or .safetensors)'
        )
    content = _read(path)
    if not isinstance(content, Mapping):
        raise ConversionError(
            f'{path.name} holds a {type(content).__name__}; expected a dict '
            'of tensors by name'
        )
    state, facts = _split(content)
    if not state:
        found = ', '.join(map(str, list(content)[:8])) or 'nothing'
        raise ConversionError(
            f'{path.name} holds no weights: got {found}; expected tensors by '
            f'name, or a dict of them below one of {_NESTED}'
        )
    for key, value in state.items():
        if not value.isfinite().all():
            raise ConversionError(
                f'{path.name}: {key} contains NaN or inf; the file is '
                'damaged or its training diverged: use another one'
            )
    for key, value in facts.items():
        try:
            facts[key] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConversionError(
                f'{path.name}: entry {key} is a {type(value).__name__}, '
                'expected a number or a list of them; remove it to do without'
            ) from error
    return Source(
        state,
        facts,
        _read_variant(path.with_name('variant.yml')),
        _read_pretrained_cfg(path.with_name('config.json')),
    )


def _split(
    content: Mapping[Any, Any],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tell weights, as float32, from what describes them.

    Weights may lie below one of ``_NESTED``, below ``sd/`` in archives of
    arrays, or at the top; wrappers' prefixes are removed.
    """
    nested = [
        content[key]
        for key in _NESTED
        if isinstance(content.get(key), Mapping) and content[key]
    ]
    found = nested[0] if nested else content
    archived = [k for k in content if str(k).startswith(_ARRAYS)]
    if archived:
        found = {k.removeprefix(_ARRAYS): content[k] for k in archived}
    facts = {
        key: value
        for section in (content, found)
        for key, value in section.items()
        if key in _FACTS and value is not None
    }
    state = {
        str(key): value.detach().contiguous()
        for key, value in found.items()
        if isinstance(value, Tensor) and key not in _FACTS
    }
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = value.float()
    for prefix in _WRAPPERS:
        if state and all(key.startswith(prefix) for key in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state, facts


def _read(path: Path) -> Any:
    """Content of a file, by its suffix.

    Raises:
        ConversionError: If it is damaged, holds code, or its library is
            missing.
    """
    readers = {'.npz': _read_npz, '.safetensors': _read_safetensors}
    reader = readers.get(path.suffix.lower())
    try:
        if reader is None:
            # Training scripts of this field save their arguments; a namespace
            # is a bag of attributes and its unpickling sets nothing else.
            return read_whole(path, also=[argparse.Namespace])
        with explained():
            return reader(path)
    except UnreadableError as error:
        why, holds_code = error.args
        if isinstance(error.__cause__, ImportError):
            message = (
                f'{path.name} needs the safetensors package to be read: pip '
                'install safetensors'
            )
        elif holds_code:
            message = (
                f'{path.name} is not a file of weights alone ({why}); files '
                'that hold more than data are refused because loading them '
                'can run code. If you trust it, save its weights alone: '
                "torch.save(model.state_dict(), 'weights.pth')"
            )
        else:
            message = (
                f'{path.name} cannot be read ({why}); it is truncated, '
                f'damaged or not a {path.suffix or "checkpoint"} file: '
                'download or copy it again'
            )
        raise ConversionError(message) from error


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


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


class _VariantLoader(yaml.SafeLoader):
    """Safe YAML and tuples, which the Segmenter repository writes."""


_VariantLoader.add_constructor(
    'tag:yaml.org,2002:python/tuple',
    lambda loader, node: tuple(loader.construct_sequence(node)),
)


def _read_variant(path: Path) -> dict[str, Any]:
    """The Segmenter repository's description of a run, if it is there.

    Raises:
        ConversionError: If it is not plain data.
    """
    if not path.is_file():
        return {}
    try:
        content = yaml.load(path.read_text(), _VariantLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConversionError(
            f'{path.name} beside the checkpoint cannot be read as plain data '
            f'({error}); restore it, or move it away to do without'
        ) from error
    return content if isinstance(content, dict) else {}


def _read_pretrained_cfg(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        return {}  # some other program's file
    found = content.get('pretrained_cfg') if isinstance(content, dict) else {}
    if not isinstance(found, dict):
        return {}
    return {
        key: value
        for key, value in found.items()
        if key in ('mean', 'std')
        and isinstance(value, list)
        and all(isinstance(number, (int, float)) for number in value)
    }
