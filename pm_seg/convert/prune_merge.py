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

from ..core.structure import PRUNED, check_rates, check_scores
from .hints import Hints, number
from .results import Converted
from .segmenter import convert_segmenter
from .sources import ConversionError
from .timm import convert_timm

# 'attn.bias' is stored by the release but takes no part in its forward pass.
_ENTRY = re.compile(
    r'(?:encoder\.)?blocks\.(\d+)\.'
    r'(?:(?:attn\.)?(merge_matrix|recover_matrix|token_mask)|attn\.(bias))$'
)
_NAMES = ('merge_matrix', 'recover_matrix', 'token_mask')

Matrices = dict[int, dict[str, Tensor]]


def convert_pm_vit(state: dict[str, Tensor], hints: Hints) -> Converted:
    """Released classifier -> mmpretrain's, see :func:`convert_timm`.

    Args:
        state (dict[str, Tensor]): timm's names and the token maps.
        hints (Hints): ``facts`` may hold ``channels`` (tokens of each block,
            prefix tokens included), ``scores``, ``keep`` and ``prune``.

    Raises:
        ConversionError: If it is something else, or entries contradict each
            other.
    """
    # Trained from DeiT or MAE, whose images are normalised like this.
    if hints.normalization is None and not hints.pretrained_cfg:
        hints = replace(hints, normalization='imagenet')
    options = dict(threshold='global', decay=0.025)
    return _convert(state, hints, convert_timm, 'channels', options)


def convert_pm_segmenter(state: dict[str, Tensor], hints: Hints) -> Converted:
    """Released Segmenter -> mmseg's, see :func:`convert_segmenter`.

    Args:
        state (dict[str, Tensor]): The Segmenter's names and the token maps
            of the encoder.
        hints (Hints): ``facts`` may hold ``merge_list`` (the compressed
            blocks), ``merged_tokens`` (tokens of each block, cls included),
            ``scores``, ``keep`` and ``prune``.

    Raises:
        ConversionError: See :func:`convert_pm_vit`.
    """
    options = dict(threshold='layer', decay=0.0)
    return _convert(state, hints, convert_segmenter, 'merged_tokens', options)


def _convert(
    state: dict[str, Tensor],
    hints: Hints,
    convert: Callable[[dict[str, Tensor], Hints], Converted],
    counts: str,
    options: dict[str, Any],
) -> Converted:
    """Convert the plain model; add options and state of its compressor.

    ``counts`` names the fact with the tokens of each block, P included.
    """
    plain, matrices = {}, {}
    for key, value in state.items():
        match = _ENTRY.match(key)
        if match is None:
            plain[key] = value
        elif match[2]:
            matrices.setdefault(int(match[1]), {})[match[2]] = value
    dense = convert(plain, hints)
    if not matrices:
        raise ConversionError(
            'no block has a merge_matrix: this checkpoint is not compressed; '
            f'use the kind {"timm" if counts == "channels" else "segmenter"!r}'
        )
    facts, depth = hints.facts, dense.geometry.num_layers
    num_prefix, patches = dense.geometry.num_prefix, prod(dense.geometry.grid)
    layers = _layers(matrices, depth, facts.get('merge_list'))
    slots = [
        _check_entries(layer, matrices[layer], patches, num_prefix)
        for layer in layers
    ]
    _check_counts(
        facts.get(counts), layers, slots, depth, num_prefix + patches
    )
    group = torch.arange(patches).repeat(depth, 1)
    scores = torch.zeros(group.shape)
    for layer in layers:
        group[layer] = _groups(layer, matrices[layer], num_prefix)
    # As recorded, else what the matrices amount to.
    total = len(layers) * patches
    num_groups = [count - num_prefix for count in slots]
    kept = number(facts, 'keep', sum(num_groups) / total)
    lost = int((group[layers] == PRUNED).sum())
    pruned = number(facts, 'prune', lost / total)
    try:
        check_rates(kept, pruned)
        if facts.get('scores') is not None:
            _read_scores(facts['scores'], scores, layers)
            check_scores(scores[layers], layers)
    except ValueError as error:
        raise ConversionError(f'{error} (in the checkpoint)') from error
    dense.model['backbone']['compression'] = dict(
        type='paper',
        keep_rate=round(kept, 6),
        prune_rate=round(pruned, 6),
        layers=layers,
        matrices='dense',
        num_groups=num_groups,
        **options,
    )
    compressor = dict(scores=scores, group=group)
    for layer in layers:
        entries = matrices[layer]
        compressor[f'merge_matrix.{layer}'] = entries['merge_matrix']
        compressor[f'restore_matrix.{layer}'] = entries['recover_matrix']
    dense.state_dict.update(
        (f'backbone.compressor.{key}', value)
        for key, value in compressor.items()
    )
    return dense


def _layers(matrices: Matrices, depth: int, listed: Any) -> list[int]:
    """Blocks that are compressed: those listed, else those with matrices."""
    if listed is None:
        layers = sorted(matrices)
    else:
        layers = sorted(int(i) for i in torch.as_tensor(listed).flatten())
        missing = [layer for layer in layers if layer not in matrices]
        if missing or not layers:
            raise ConversionError(
                f'merge_list names the blocks {layers}, but '
                f'{missing or "none"} of them have a merge_matrix; the file '
                'is incomplete: copy it again'
            )
    if layers[-1] >= depth:
        raise ConversionError(
            f'block {layers[-1]} has a merge_matrix, the model has {depth} '
            'blocks; the file is incomplete: copy it again'
        )
    return layers


def _check_entries(
    layer: int, entries: dict[str, Tensor], patches: int, num_prefix: int
) -> int:
    """Tokens the block works on, P included."""
    missing = [name for name in _NAMES if name not in entries]
    if missing:
        raise ConversionError(
            f'block {layer} has no {" and no ".join(missing)}; expected '
            f'{", ".join(_NAMES)} in each compressed block: copy the file '
            'again'
        )
    tokens = num_prefix + patches
    shapes = {name: tuple(entries[name].shape) for name in _NAMES}
    slots = (*shapes['merge_matrix'], 0)[0]
    expected = (slots, tokens), (tokens, slots), (tokens,)
    if (*shapes.values(),) != expected or not num_prefix < slots <= tokens:
        raise ConversionError(
            f'block {layer}: got {shapes}, expected merge_matrix (K, '
            f'{tokens}), recover_matrix ({tokens}, K) and token_mask '
            f'({tokens},) with {num_prefix} < K <= {tokens}; if the model '
            'was made for another image size, give --img-size'
        )
    mask = entries['token_mask'].float()
    if not ((mask == 0) | (mask == 1)).all() or not mask[:num_prefix].all():
        raise ConversionError(
            f'token_mask of block {layer} has values other than 0 and 1, or '
            'a pruned prefix token; expected 1 for tokens that are restored '
            'and 0 for those that the shortcut keeps: such a block cannot be '
            'converted'
        )
    return slots


def _check_counts(
    counts: Any, layers: list[int], slots: list[int], depth: int, tokens: int
) -> None:
    if counts is None:
        return
    given = [int(n) for n in torch.as_tensor(counts).flatten()]
    expected = [tokens] * depth
    for layer, count in zip(layers, slots):
        expected[layer] = count
    if given not in (expected, slots):
        raise ConversionError(
            f'the checkpoint says its blocks work on {given} tokens, its '
            f'merge matrices are for {expected}; it is damaged or mixed from '
            'two: copy it again'
        )


def _groups(layer: int, entries: dict[str, Tensor], num_prefix: int) -> Tensor:
    """The group each token counts most for, -1 if pruned, int64, (N,).

    For reports alone, and so that no group is empty: dense matrices say
    themselves what is merged with what.
    """
    weight = entries['merge_matrix'][num_prefix:, num_prefix:].abs()
    live = entries['token_mask'][num_prefix:] > 0
    weight = torch.where(live, weight, -1.0)
    if live.sum() < len(weight):
        raise ConversionError(
            f'block {layer} has {len(weight)} groups but only '
            f'{int(live.sum())} tokens that are not pruned; the file is '
            'damaged: copy it again'
        )
    group = torch.where(live, weight.argmax(0), PRUNED)
    sizes = group[live].bincount(minlength=len(weight))
    for empty in (sizes == 0).nonzero().flatten().tolist():
        spare = live & (sizes[group.clamp_min(0)] > 1)
        token = torch.where(spare, weight[empty], -1.0).argmax()
        sizes[group[token]] -= 1
        sizes[empty] += 1
        group[token] = empty
    return group


def _read_scores(given: Any, scores: Tensor, layers: list[int]) -> None:
    """Fill in scores, (depth, N), given for all or for compressed blocks."""
    given = torch.as_tensor(given).float()
    if given.shape == scores.shape:
        scores.copy_(given)
    elif given.shape == scores[layers].shape:
        scores[layers] = given
    else:
        raise ConversionError(
            f'scores have shape {tuple(given.shape)}, expected '
            f'{tuple(scores.shape)}: one value per block and patch token'
        )
