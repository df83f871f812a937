"""Released Prune-and-Merge models (Mao et al., arXiv 2503.23455).

A compressed block there has three entries beside the weights of a plain one:
``merge_matrix`` (P+K, P+N), ``recover_matrix`` (P+N, P+K) and ``token_mask``
(P+N,), 0 for pruned tokens, which the shortcut ``diag(1 - mask)`` keeps. They
are below ``attn`` in classifiers. Training changes the matrices everywhere,
so they are taken over whole (``matrices='dense'``).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..core import DenseTokenMap
from ..core.structure import PRUNED, check_rates, check_scores
from ..utils.checkpoints import CheckpointError
from .keys import Geometry
from .results import Converted
from .segmenter import convert_segmenter
from .sources import Hints, number
from .timm import convert_timm

# 'attn.bias' is stored by the release but takes no part in its forward pass.
_ENTRY = re.compile(
    r'(?:encoder\.)?blocks\.(\d+)\.'
    r'(?:(?:attn\.)?(merge_matrix|recover_matrix|token_mask)|attn\.(bias))$'
)


def convert_pm_vit(state: dict[str, Tensor], hints: Hints) -> Converted:
    """Released classifier -> mmpretrain's, see :func:`convert_timm`.

    Args:
        state (dict[str, Tensor]): timm's names and the token maps.
        hints (Hints): ``facts`` may hold ``scores``, ``keep`` and ``prune``.

    Raises:
        CheckpointError: If it is something else, or entries contradict each
            other.
    """
    # Trained from DeiT or MAE, whose images are normalised like this.
    if hints.normalization is None and not hints.pretrained_cfg:
        hints = replace(hints, normalization='imagenet')
    options = dict(threshold='global', decay=0.025)
    return _convert(state, hints, convert_timm, 'timm', options)


def convert_pm_segmenter(state: dict[str, Tensor], hints: Hints) -> Converted:
    """Released Segmenter -> mmseg's, see :func:`convert_segmenter`.

    Args:
        state (dict[str, Tensor]): The Segmenter's names and the token maps
            of the encoder.
        hints (Hints): ``facts`` may hold ``merge_list`` (the compressed
            blocks), ``scores``, ``keep`` and ``prune``.

    Raises:
        CheckpointError: See :func:`convert_pm_vit`.
    """
    options = dict(threshold='layer', decay=0.0)
    return _convert(state, hints, convert_segmenter, 'segmenter', options)


def _convert(
    state: dict[str, Tensor],
    hints: Hints,
    convert: Callable[[dict[str, Tensor], Hints], Converted],
    kind: str,
    options: dict[str, Any],
) -> Converted:
    """Convert the plain model; add options and state of its compressor."""
    plain: dict[str, Tensor] = {}
    blocks: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        match = _ENTRY.match(key)
        if match is None:
            plain[key] = value
        elif match[2]:
            blocks.setdefault(int(match[1]), {})[match[2]] = value
    dense, facts = convert(plain, hints), hints.facts
    # Blocks outside of the list run on all tokens, whatever is stored.
    listed = facts.get('merge_list')
    layers = sorted(blocks if listed is None else listed.flatten().tolist())
    if not blocks or not layers:
        raise CheckpointError(
            'no block has a merge_matrix: this checkpoint is not compressed; '
            f'use the kind {kind!r}'
        )
    depth, num_prefix = dense.geometry.num_layers, dense.geometry.num_prefix
    group = torch.arange(prod(dense.geometry.grid)).repeat(depth, 1)
    entries, num_groups = dict(group=group), []
    for layer in layers:
        if layer >= depth:
            raise CheckpointError(
                f'block {layer} has a merge_matrix, the model has {depth} '
                'blocks; the file is incomplete: copy it again'
            )
        found = _token_map(layer, blocks.get(layer, {}), dense.geometry)
        group[layer] = found.groups(num_prefix)
        num_groups.append(found.num_merged - num_prefix)
        entries[f'merge_matrix.{layer}'] = found.merge_matrix
        entries[f'restore_matrix.{layer}'] = found.restore_matrix
    # Rates as recorded, else what the matrices amount to.
    patches = group[layers].numel()
    lost = int((group[layers] == PRUNED).sum())
    kept = number(facts, 'keep', sum(num_groups) / patches)
    pruned = number(facts, 'prune', lost / patches)
    entries['scores'] = torch.zeros(group.shape)
    try:
        check_rates(kept, pruned)
        if 'scores' in facts:
            _read_scores(facts['scores'].float(), entries['scores'], layers)
    except ValueError as error:
        raise CheckpointError(f'{error} (in the checkpoint)') from error
    dense.model['backbone']['compression'] = dict(
        type='paper',
        keep_rate=round(kept, 6),
        prune_rate=round(pruned, 6),
        layers=layers,
        matrices='dense',
        num_groups=num_groups,
        **options,
    )
    for key, value in entries.items():
        dense.state_dict[f'backbone.compressor.{key}'] = value
    return dense


def _token_map(
    layer: int, entries: dict[str, Tensor], geometry: Geometry
) -> DenseTokenMap:
    """The token map of a block, if its entries are whole and fit."""
    names = ('merge_matrix', 'recover_matrix', 'token_mask')
    missing = [name for name in names if name not in entries]
    if missing:
        raise CheckpointError(
            f'block {layer} has no {" and no ".join(missing)}; expected '
            f'{", ".join(names)} in each compressed block: copy the file '
            'again'
        )
    merge, restore, mask = (entries[name] for name in names)
    prefix = geometry.num_prefix
    tokens = prefix + prod(geometry.grid)
    shapes = [tuple(entries[name].shape) for name in names]
    slots = (*shapes[0], 0)[0]
    expected = [(slots, tokens), (tokens, slots), (tokens,)]
    if shapes != expected or not prefix < slots <= tokens:
        raise CheckpointError(
            f'block {layer}: got {dict(zip(names, shapes))}, expected '
            f'merge_matrix (K, {tokens}), recover_matrix ({tokens}, K) and '
            f'token_mask ({tokens},) with {prefix} < K <= {tokens}; if the '
            'model was made for another image size, give --img-size'
        )
    if not ((mask == 0) | (mask == 1)).all() or not mask[:prefix].all():
        raise CheckpointError(
            f'token_mask of block {layer} has values other than 0 and 1, or '
            'a pruned prefix token; expected 1 for tokens that are restored '
            'and 0 for those that the shortcut keeps: such a block cannot be '
            'converted'
        )
    return DenseTokenMap(merge, restore, mask > 0)


def _read_scores(given: Tensor, scores: Tensor, layers: list[int]) -> None:
    """Fill in scores, (depth, N), given for all or for compressed blocks."""
    if given.shape == scores.shape:
        scores.copy_(given)
    elif given.shape == scores[layers].shape:
        scores[layers] = given
    else:
        raise ValueError(
            f'scores have shape {tuple(given.shape)}, expected '
            f'{tuple(scores.shape)}: one value per block and patch token'
        )
    check_scores(scores[layers], layers)
