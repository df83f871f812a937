"""Vision Transformers with timm's parameter names: their sizes, renaming.

timm, DeiT, MAE, the Segmenter repository and the release of Prune-and-Merge
share them (``patch_embed.proj``, ``blocks.0.attn.qkv``, ...).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from math import isqrt
from typing import Any

from mmengine.registry import DefaultScope
from torch import Tensor

from .hints import Hints
from .sources import ConversionError

_BLOCK = re.compile(r'blocks\.(\d+)\.')
_HEAD_DIMS = 64

#: (embed_dims, num_layers, feedforward_channels): (mmpretrain's name, heads).
ARCHS = {
    (192, 12, 768): ('deit-tiny', 3),
    (384, 12, 1536): ('deit-small', 6),
    (768, 12, 3072): ('deit-base', 12),
    (768, 8, 2304): ('small', 8),
    (1024, 24, 4096): ('large', 16),
    (1280, 32, 5120): ('huge', 16),
}

#: Parts of our names and of timm's, replaced one after the other.
_NAMES = (
    ('.ln', '.norm'),
    ('.ffn.layers.0.0', '.mlp.fc1'),
    ('.ffn.layers.1', '.mlp.fc2'),
    ('layers.', 'blocks.'),
    ('.attn.attn.in_proj_', '.attn.qkv.'),
    ('.attn.attn.out_proj', '.attn.proj'),
    ('.attn.gamma1.weight', '.ls1.gamma'),
    ('.ffn.gamma2.weight', '.ls2.gamma'),
    ('.projection', '.proj'),
)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries below a prefix, without it."""
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def shape_of(
    state: Mapping[str, Tensor], key: str, dims: int, what: str
) -> tuple[int, ...]:
    """Shape of an entry that sizes are taken from.

    Raises:
        ConversionError: If it is not there or does not have ``dims``
            dimensions of at least 1.
    """
    if key not in state:
        raise ConversionError(_foreign(list(state), what, key))
    shape = tuple(state[key].shape)
    if len(shape) != dims or 0 in shape:
        raise ConversionError(
            f'{key} has shape {shape}, expected {dims} dimensions; this is '
            f'no {what} checkpoint or a damaged one'
        )
    return shape


def _foreign(keys: list[str], what: str, expected: str) -> str:
    """Message for a checkpoint of something else, with a guess at what."""
    starts = {key.split('.')[0].split('/')[0] for key in keys}
    if any(key.startswith('encoder.blocks.') for key in keys) and (
        'decoder' in starts
    ):
        kind = 'pm-segmenter' if _has_matrices(keys) else 'segmenter'
        advice = f'it looks like a Segmenter: use the kind {kind!r}'
    elif 'backbone' in starts:
        advice = (
            'it looks like an OpenMMLab checkpoint, which loads as it is: '
            "change the type in its config to 'PMVisionTransformer'"
        )
    elif 'Transformer' in starts:
        advice = (
            'it has the names of the JAX original: load it with timm and '
            "save the weights, torch.save(model.state_dict(), 'vit.pth')"
        )
    elif starts & {'blocks', 'patch_embed', 'pos_embed'}:
        advice = 'it seems to be incomplete: download or copy it again'
    else:
        advice = 'only plain Vision Transformers can be converted'
    return (
        f'this is no {what} checkpoint: expected {expected}, got '
        f'{", ".join(keys[:4])}{", ..." if len(keys) > 4 else ""}; {advice}'
    )


def _has_matrices(keys: Iterable[str]) -> bool:
    return any(key.endswith('.merge_matrix') for key in keys)


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Vision Transformer.

    Attributes:
        embed_dims, num_layers, num_heads, hidden_dims (int): C, depth, heads
            and channels of the feed-forward layers.
        patch_size, in_channels (int): Of the patch embedding.
        img_size (tuple[int, int]): What the position embedding is for.
        num_prefix (int): 1, or 2 with a distillation token.
        qkv_bias (bool): Whether queries, keys and values have a bias.
        embeds_prefix (bool): Whether prefix tokens have positions.
    """

    embed_dims: int
    num_layers: int
    num_heads: int
    hidden_dims: int
    patch_size: int
    in_channels: int
    img_size: tuple[int, int]
    num_prefix: int
    qkv_bias: bool
    embeds_prefix: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        height, width = self.img_size
        return height // self.patch_size, width // self.patch_size


def read_geometry(
    state: Mapping[str, Tensor],
    hints: Hints,
    what: str,
    patch_positions: bool = False,
) -> Geometry:
    """Sizes of the Vision Transformer that a state dict is of.

    Args:
        state (dict[str, Tensor]): With timm's names.
        hints (Hints): Overrides; checked against the shapes.
        what (str): What was expected, for messages.
        patch_positions (bool): Whether the position embedding may be for
            patch tokens alone, as in some of timm's models (DeiT III).
            Taken for that where only this gives a square. Defaults to False.

    Raises:
        ConversionError: If it is none, or its image size or number of heads
            cannot be known.
    """
    shape_of(state, 'cls_token', 3, what)
    length = shape_of(state, 'pos_embed', 3, what)[1]
    embed_dims, in_channels, patch, across = shape_of(
        state, 'patch_embed.proj.weight', 4, what
    )
    hidden = shape_of(state, 'blocks.0.mlp.fc1.weight', 2, what)[0]
    if patch != across:
        raise ConversionError(
            f'patches of {patch}x{across} pixels are not square; only square '
            'ones can be converted'
        )
    layers = count_blocks(state, what)
    num_prefix = 1 + ('dist_token' in state)
    if hints.img_size is not None:
        height, width = hints.img_size
        alone = (height // patch) * (width // patch) == length
    else:
        alone = _is_square(length) and not _is_square(length - num_prefix)
    embeds_prefix = not (patch_positions and alone)
    patches = length - num_prefix * embeds_prefix
    return Geometry(
        embed_dims=embed_dims,
        num_layers=layers,
        num_heads=_find_heads((embed_dims, layers, hidden), hints.num_heads),
        hidden_dims=hidden,
        patch_size=patch,
        in_channels=in_channels,
        img_size=_find_img_size(patches, patch, hints.img_size),
        num_prefix=num_prefix,
        qkv_bias='blocks.0.attn.qkv.bias' in state,
        embeds_prefix=embeds_prefix,
    )


def count_blocks(state: Mapping[str, Tensor], what: str) -> int:
    """Number of ``blocks.*``.

    Raises:
        ConversionError: If they are not numbered without gaps from 0.
    """
    found = {int(m[1]) for m in map(_BLOCK.match, state) if m}
    if not found or max(found) + 1 != len(found):
        raise ConversionError(
            f'got the blocks {sorted(found)} of a {what}, expected 0, 1, 2, '
            '... without gaps; the file is incomplete: copy it again'
        )
    return len(found)


def _is_square(count: int) -> bool:
    return count > 0 and isqrt(count) ** 2 == count


def _find_heads(sizes: tuple[int, int, int], given: int | None) -> int:
    dims = sizes[0]
    heads = given
    if heads is None:
        heads = ARCHS[sizes][1] if sizes in ARCHS else dims / _HEAD_DIMS
    if heads < 1 or heads != int(heads) or dims % heads:
        raise ConversionError(
            f'{dims} channels cannot be split into {heads:g} heads; weights '
            'do not say how many there are: give --num-heads'
        )
    return int(heads)


def _find_img_size(
    patches: int, patch: int, given: tuple[int, int] | None
) -> tuple[int, int]:
    if given is None:
        if not _is_square(patches):
            raise ConversionError(
                f'the position embedding is for {patches} patches, which '
                'form no square; give --img-size HEIGHT WIDTH'
            )
        return isqrt(patches) * patch, isqrt(patches) * patch
    height, width = given
    expected = (height // patch) * (width // patch)
    if expected != patches:
        raise ConversionError(
            f'the position embedding is for {patches} patches of '
            f'{patch}x{patch} pixels, an image of {height}x{width} has '
            f'{expected}; give the --img-size the model was trained with'
        )
    return height, width


def rename(
    state: Mapping[str, Tensor],
    model: dict[str, Any],
    scope: str,
    names: Sequence[tuple[str, str]],
    what: str,
    ignored: tuple[str, ...],
) -> dict[str, Tensor]:
    """The entries of a model from those of a checkpoint, all or none.

    Args:
        state (dict[str, Tensor]): The checkpoint's weights.
        model (dict): Config of our model, built for its names and shapes.
        scope (str): 'mmseg' or 'mmpretrain', whose model it is.
        names (Sequence[tuple[str, str]]): Parts of our names and of the
            checkpoint's that replace them, those of blocks and embeddings
            aside.
        what (str): What was expected, for messages.
        ignored (tuple[str, ...]): Prefixes of entries that may be dropped.

    Raises:
        ConversionError: On missing, misshapen or unexpected entries.
    """
    with DefaultScope.overwrite_default_scope(scope):
        models = import_module(f'{scope}.registry').MODELS
        entries = models.build(deepcopy(model)).state_dict()
    problems, renamed, known = [], {}, set()
    for new, entry in entries.items():
        old = new
        for ours, theirs in (*names, *_NAMES):
            old = old.replace(ours, theirs)
        known.add(old)
        expected = tuple(entry.shape)
        if old not in state:
            problems.append(f'{old}: missing, expected {expected}')
        elif tuple(state[old].shape) != expected:
            got = tuple(state[old].shape)
            problems.append(f'{old}: got shape {got}, expected {expected}')
        elif not state[old].is_floating_point():
            problems.append(f'{old}: got {state[old].dtype}, expected floats')
        else:
            renamed[new] = state[old]
    problems += [
        f'{key}: unexpected'
        for key in state
        if key not in known and not key.startswith(ignored)
    ]
    if problems and _has_matrices(state):
        raise ConversionError(
            f'this {what} has merge matrices: it is compressed; use the kind '
            "'pm-vit' for a classifier or 'pm-segmenter'"
        )
    if problems:
        shown = '\n  '.join(problems[:12])
        more = len(problems) - 12
        raise ConversionError(
            f'this is no {what} checkpoint, a damaged one or one of a variant '
            f'that is not supported:\n  {shown}'
            + (f'\n  ... and {more} more' if more > 0 else '')
            + '\nDownload or copy it again if entries are missing; with '
            'unexpected ones the model differs from the plain architecture'
        )
    return renamed
