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
from typing import Any

import torch
from torch import Tensor

from ..core.merging import Grid
from ..core.structure import PRUNED, check_rates, check_scores
from .keys import Hints, number
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
        hints = Hints(**{**vars(hints), 'normalization': 'imagenet'})
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
    plain, matrices = split_matrices(state)
    dense = convert(plain, hints)
    if not matrices:
        raise ConversionError(
            'no block has a merge_matrix: this checkpoint is not compressed; '
            f'use the kind {"timm" if counts == "channels" else "segmenter"!r}'
        )
    backbone = dense.model['backbone']
    positions = dense.state_dict['backbone.pos_embed'].shape[1]
    patch, img_size = backbone['patch_size'], backbone['img_size']
    grid = (img_size[0] // patch, img_size[1] // patch)
    depth = 1 + max(
        int(key.split('.')[2])
        for key in dense.state_dict
        if key.startswith('backbone.layers.')
    )
    compression, compressor = convert_matrices(
        matrices,
        depth,
        grid,
        num_prefix=positions - grid[0] * grid[1],
        facts={**hints.facts, 'counts': hints.facts.get(counts)},
        options=options,
    )
    backbone['compression'] = compression
    dense.state_dict.update(
        (f'backbone.compressor.{key}', value)
        for key, value in compressor.items()
    )
    return dense


def split_matrices(
    state: dict[str, Tensor],
) -> tuple[dict[str, Tensor], Matrices]:
    """Tell the token maps from the plain model, by block."""
    plain, matrices = {}, {}
    for key, value in state.items():
        match = _ENTRY.match(key)
        if match is None:
            plain[key] = value
        elif match[2]:
            matrices.setdefault(int(match[1]), {})[match[2]] = value
    return plain, matrices


def convert_matrices(
    matrices: Matrices,
    depth: int,
    grid: Grid,
    num_prefix: int,
    facts: dict[str, Any],
    options: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options and state of the compressor that has these token maps.

    Args:
        matrices (dict[int, dict[str, Tensor]]): Entries by block.
        depth (int): Number of blocks.
        grid (tuple[int, int]): Patch rows and columns, N = h * w.
        num_prefix (int): P.
        facts (dict[str, Tensor]): ``counts`` (tokens of each block, P
            included), ``merge_list``, ``scores``, ``keep`` and ``prune``,
            where known.
        options (dict): More options of the compressor.

    Returns:
        tuple[dict, dict[str, Tensor]]: ``compression`` and the state dict of
        its :class:`~pm_seg.core.StaticCompressor`.

    Raises:
        ConversionError: On missing or misshapen entries, masks that are not
            0 or 1, and counts, lists or scores that do not fit.
    """
    layers = _layers(matrices, depth, facts.get('merge_list'))
    tokens = num_prefix + grid[0] * grid[1]
    for layer in layers:
        _check_entries(layer, matrices[layer], tokens, num_prefix)
    slots = [matrices[layer]['merge_matrix'].shape[0] for layer in layers]
    _check_counts(facts.get('counts'), layers, slots, depth, tokens)

    group = torch.arange(tokens - num_prefix).repeat(depth, 1)
    for layer in layers:
        group[layer] = _groups(layer, matrices[layer], num_prefix)
    num_groups = [count - num_prefix for count in slots]
    compression = dict(
        type='paper',
        **_rates(facts, num_groups, group[layers]),
        layers=layers,
        matrices='dense',
        num_groups=num_groups,
        **options,
    )
    state = dict(scores=torch.zeros(group.shape), group=group)
    try:
        check_rates(compression['keep_rate'], compression['prune_rate'])
        if facts.get('scores') is not None:
            state['scores'] = _scores(facts['scores'], layers, group.shape)
            check_scores(state['scores'][layers], layers)
    except ValueError as error:
        raise ConversionError(f'{error} (in the checkpoint)') from error
    for layer in layers:
        entries = matrices[layer]
        state[f'merge_matrix.{layer}'] = entries['merge_matrix']
        state[f'restore_matrix.{layer}'] = entries['recover_matrix']
    return compression, state


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
    layer: int, entries: dict[str, Tensor], tokens: int, num_prefix: int
) -> None:
    missing = [name for name in _NAMES if name not in entries]
    if missing:
        raise ConversionError(
            f'block {layer} has no {" and no ".join(missing)}; expected '
            f'{", ".join(_NAMES)} in each compressed block: copy the file '
            'again'
        )
    shapes = {name: tuple(entries[name].shape) for name in _NAMES}
    slots = (*shapes['merge_matrix'], 0)[0]
    expected = dict(
        merge_matrix=(slots, tokens),
        recover_matrix=(tokens, slots),
        token_mask=(tokens,),
    )
    if shapes != expected or not num_prefix < slots <= tokens:
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


def _rates(
    facts: dict[str, Any], num_groups: list[int], group: Tensor
) -> dict[str, float]:
    """Rates: as recorded, else what the matrices amount to."""
    total = group.numel()
    kept = number(facts, 'keep', sum(num_groups) / total)
    pruned = number(facts, 'prune', int((group == PRUNED).sum()) / total)
    return dict(keep_rate=round(kept, 6), prune_rate=round(pruned, 6))


def _scores(scores: Any, layers: list[int], shape: torch.Size) -> Tensor:
    """Scores of all blocks, (depth, N), of all or of compressed ones."""
    scores = torch.as_tensor(scores).float()
    if tuple(scores.shape) == (len(layers), shape[1]):
        full = torch.zeros(shape)
        full[layers] = scores
        return full
    if scores.shape != shape:
        raise ConversionError(
            f'scores have shape {tuple(scores.shape)}, expected '
            f'{tuple(shape)}: one value per block and patch token'
        )
    return scores
