"""The parameter names of timm's Vision Transformer, and renaming them.

timm, DeiT, MAE, the Segmenter repository and the release of Prune-and-Merge
share them (``patch_embed.proj``, ``blocks.0.attn.qkv``, ...).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sources import ConversionError, Source

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

_MMPRETRAIN_BLOCK = {
    'norm1': 'ln1',
    'attn.qkv': 'attn.qkv',
    'attn.proj': 'attn.proj',
    'norm2': 'ln2',
    'mlp.fc1': 'ffn.layers.0.0',
    'mlp.fc2': 'ffn.layers.1',
}
_MMSEG_BLOCK = {
    **_MMPRETRAIN_BLOCK,
    'attn.qkv': 'attn.attn.in_proj',
    'attn.proj': 'attn.attn.out_proj',
}


class Renaming(NamedTuple):
    """An entry that a checkpoint must have.

    Attributes:
        old (str): Its name there.
        new (str): Its name here.
        shape (tuple[int, ...]): Its shape.
    """

    old: str
    new: str
    shape: tuple[int, ...]


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
        heads = number(source.facts, 'num_heads')
        img_size = source.facts.get('img_size')
        found = dict(
            num_heads=None if heads is None else int(heads),
            img_size=None if img_size is None else pair(img_size),
        )
        found.update((k, v) for k, v in given.items() if v is not None)
        return cls(
            facts=source.facts,
            variant=source.variant,
            pretrained_cfg=source.pretrained_cfg,
            **found,
        )


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


def shape_of(
    state: dict[str, Tensor], key: str, dims: int, what: str
) -> tuple[int, ...]:
    """Shape of an entry that sizes are taken from.

    Raises:
        ConversionError: If it is not there or does not have ``dims``
            dimensions of at least 1.
    """
    if key not in state:
        raise ConversionError(_foreign(state, what, key))
    shape = tuple(state[key].shape)
    if len(shape) != dims or 0 in shape:
        raise ConversionError(
            f'{key} has shape {shape}, expected {dims} dimensions; this is '
            f'no {what} checkpoint or a damaged one'
        )
    return shape


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
    embeds_prefix: bool = True

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        height, width = self.img_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N, patch tokens."""
        return self.grid[0] * self.grid[1]


def read_geometry(
    state: dict[str, Tensor],
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
        square = _root(length) is not None
        alone = square and _root(length - num_prefix) is None
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


def count_blocks(state: dict[str, Tensor], what: str) -> int:
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


def _root(number: int) -> int | None:
    root = int(max(number, 0) ** 0.5 + 0.5)
    return root if root > 0 and root * root == number else None


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
    if given is not None:
        height, width = given
        if (height // patch) * (width // patch) != patches:
            raise ConversionError(
                f'the position embedding is for {patches} patches of '
                f'{patch}x{patch} pixels, an image of {height}x{width} has '
                f'{(height // patch) * (width // patch)}; give the --img-size '
                'the model was trained with'
            )
        return height, width
    side = _root(patches)
    if side is None:
        raise ConversionError(
            f'the position embedding is for {patches} patches, which form no '
            'square; give --img-size HEIGHT WIDTH'
        )
    return side * patch, side * patch


def _foreign(state: dict[str, Tensor], what: str, key: str) -> str:
    """Message for a checkpoint of something else, with a guess at what."""
    keys = list(state)

    def any_starts(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if any_starts('encoder.blocks.') and any_starts('decoder.'):
        kind = 'pm-segmenter' if _has_matrices(keys) else 'segmenter'
        advice = f'it looks like a Segmenter: use the kind {kind!r}'
    elif any_starts('backbone.'):
        advice = (
            'it looks like an OpenMMLab checkpoint, which loads as it is: '
            "change the type in its config to 'PMVisionTransformer'"
        )
    elif any_starts('Transformer/'):
        advice = (
            'it has the names of the JAX original: load it with timm and '
            "save the weights, torch.save(model.state_dict(), 'vit.pth')"
        )
    elif any_starts('blocks.', 'patch_embed.', 'pos_embed'):
        advice = 'it seems to be incomplete: download or copy it again'
    else:
        advice = 'only plain Vision Transformers can be converted'
    shown = ', '.join(keys[:4])
    return (
        f'this is no {what} checkpoint: expected {key}, got {shown}'
        f'{", ..." if len(keys) > 4 else ""}; {advice}'
    )


def _has_matrices(keys: Iterable[str]) -> bool:
    return any(key.endswith('.merge_matrix') for key in keys)


def linear(
    old: str, new: str, out_dims: int, in_dims: int, bias: bool = True
) -> Iterator[Renaming]:
    """Weight and bias of a linear layer, (out, in) and (out,)."""
    yield Renaming(f'{old}.weight', f'{new}.weight', (out_dims, in_dims))
    if bias:
        yield Renaming(f'{old}.bias', f'{new}.bias', (out_dims,))


def norm(old: str, new: str, dims: int) -> Iterator[Renaming]:
    """Weight and bias of a layer normalisation, (dims,)."""
    yield Renaming(f'{old}.weight', f'{new}.weight', (dims,))
    yield Renaming(f'{old}.bias', f'{new}.bias', (dims,))


def blocks(
    num_layers: int, dims: int, hidden: int, qkv_bias: bool, mmseg: bool
) -> Iterator[Renaming]:
    """Entries of transformer layers.

    Args:
        num_layers (int): Their number.
        dims (int): C.
        hidden (int): Channels of the feed-forward layers.
        qkv_bias (bool): Whether queries, keys and values have a bias.
        mmseg (bool): Names of mmseg, else of mmpretrain.
    """
    names = _MMSEG_BLOCK if mmseg else _MMPRETRAIN_BLOCK
    sizes = {
        'attn.qkv': (3 * dims, dims),
        'attn.proj': (dims, dims),
        'mlp.fc1': (hidden, dims),
        'mlp.fc2': (dims, hidden),
    }
    for index in range(num_layers):
        for old, new in names.items():
            # mmseg: in_proj_weight; everywhere else: name.weight
            dot = '_' if new.endswith('in_proj') else '.'
            old, new = f'blocks.{index}.{old}', f'layers.{index}.{new}'
            size = sizes.get(old.split('.', 2)[2])
            yield Renaming(
                f'{old}.weight', f'{new}{dot}weight', size or (dims,)
            )
            if qkv_bias or not old.endswith('qkv'):
                width = size[0] if size else dims
                yield Renaming(f'{old}.bias', f'{new}{dot}bias', (width,))


def embeddings(geometry: Geometry, patch_bias: bool) -> Iterator[Renaming]:
    """Entries of the patch, class and position embeddings."""
    dims, patch = geometry.embed_dims, geometry.patch_size
    old, new = 'patch_embed.proj', 'patch_embed.projection'
    shape = (dims, geometry.in_channels, patch, patch)
    yield Renaming(f'{old}.weight', f'{new}.weight', shape)
    if patch_bias:
        yield Renaming(f'{old}.bias', f'{new}.bias', (dims,))
    tokens = geometry.num_tokens
    tokens += geometry.num_prefix * geometry.embeds_prefix
    yield Renaming('pos_embed', 'pos_embed', (1, tokens, dims))
    yield Renaming('cls_token', 'cls_token', (1, 1, dims))
    if geometry.num_prefix == 2:
        yield Renaming('dist_token', 'dist_token', (1, 1, dims))


def rename(
    state: dict[str, Tensor],
    table: Sequence[Renaming],
    what: str,
    ignored: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Rename the entries of a state dict, all of them or none.

    Args:
        state (dict[str, Tensor]): Weights.
        table (Sequence[Renaming]): What is expected in it.
        what (str): What was expected, for messages.
        ignored (Sequence[str]): Prefixes of entries that may be dropped.

    Raises:
        ConversionError: On missing, misshapen or unexpected entries.
    """
    problems, renamed = [], {}
    for old, new, shape in table:
        if old not in state:
            problems.append(f'{old}: missing, expected {shape}')
        elif tuple(state[old].shape) != shape:
            got = tuple(state[old].shape)
            problems.append(f'{old}: got shape {got}, expected {shape}')
        elif not state[old].is_floating_point():
            problems.append(f'{old}: got {state[old].dtype}, expected floats')
        else:
            renamed[new] = state[old]
    known = {entry.old for entry in table}
    problems += [
        f'{key}: unexpected'
        for key in state
        if key not in known and not key.startswith(tuple(ignored) or ('\0',))
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
