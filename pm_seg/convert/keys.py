"""Vision Transformers with timm's parameter names: their sizes, renaming.

timm, DeiT, MAE, the Segmenter repository and the release of Prune-and-Merge
share them (``patch_embed.proj``, ``blocks.0.attn.qkv``, ...).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from math import isqrt
from typing import Any

from mmengine.registry import DefaultScope
from torch import Tensor

from ..utils.checkpoints import CheckpointError
from .sources import Hints

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

#: What a checkpoint of something else is, by the start of a key of it.
_FOREIGN = {
    'encoder.blocks.': (
        "it looks like a Segmenter: use the kind 'segmenter', or if it has "
        "merge matrices use the kind 'pm-segmenter'"
    ),
    'backbone.': (
        'it looks like an OpenMMLab checkpoint, which loads as it is: change '
        "the type in its config to 'PMVisionTransformer'"
    ),
    'Transformer/': (
        'it has the names of the JAX original: load it with timm and save '
        "the weights, torch.save(model.state_dict(), 'vit.pth')"
    ),
    'blocks.': 'it seems to be incomplete: download or copy it again',
}


def shape_of(
    state: Mapping[str, Tensor], key: str, dims: int, what: str
) -> tuple[int, ...]:
    """Shape of an entry that sizes are taken from, with ``dims`` dimensions of
    at least 1, or ``CheckpointError``."""
    if key not in state:
        advice = (
            text
            for start, text in _FOREIGN.items()
            if any(name.startswith(start) for name in state)
        )
        raise CheckpointError(
            f'this is no {what} checkpoint: expected {key}, got '
            f'{", ".join(list(state)[:4])}{", ..." * (len(state) > 4)}; '
            + next(advice, 'only plain Vision Transformers can be converted')
        )
    shape = tuple(state[key].shape)
    if len(shape) != dims or 0 in shape:
        raise CheckpointError(
            f'{key} has shape {shape}, expected {dims} dimensions; this is '
            f'no {what} checkpoint or a damaged one'
        )
    return shape


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Vision Transformer."""

    embed_dims: int
    num_layers: int
    hidden_dims: int  # of the feed-forward layers
    num_heads: int
    patch_size: int
    in_channels: int
    img_size: tuple[int, int]  # what the position embedding is for
    num_prefix: int  # 1, or 2 with a distillation token
    embeds_prefix: bool  # whether prefix tokens have positions

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        height, width = self.img_size
        return height // self.patch_size, width // self.patch_size


def read_geometry(
    state: Mapping[str, Tensor], hints: Hints, what: str
) -> Geometry:
    """Sizes of the Vision Transformer that a state dict is of.

    Hints override what is guessed and are checked against the shapes.

    Raises:
        CheckpointError: If it is none, or its image size or number of heads
            cannot be known.
    """
    shape_of(state, 'cls_token', 3, what)
    length = shape_of(state, 'pos_embed', 3, what)[1]
    embed_dims, in_channels, patch, across = shape_of(
        state, 'patch_embed.proj.weight', 4, what
    )
    hidden = shape_of(state, 'blocks.0.mlp.fc1.weight', 2, what)[0]
    if patch != across:
        raise CheckpointError(
            f'patches of {patch}x{across} pixels are not square; only square '
            'ones can be converted'
        )
    num_prefix = 1 + ('dist_token' in state)
    # Some of timm's models (DeiT III) have positions of patches alone.
    for patches in (length - num_prefix, length):
        side = isqrt(max(patches, 0)) * patch
        height, width = hints.img_size or (side, side)
        found = (height // patch) * (width // patch)
        if 0 < found == patches:
            break
    else:
        raise CheckpointError(
            f'the position embedding is for {length - num_prefix} patches of '
            f'{patch}x{patch} pixels, an image of {height}x{width} has '
            f'{found}; give the --img-size HEIGHT WIDTH it was trained with'
        )
    sizes = (embed_dims, count_blocks(state), hidden)
    _, heads = ARCHS.get(sizes, ('', embed_dims / 64))
    if hints.num_heads is not None:
        heads = hints.num_heads
    if heads < 1 or heads != int(heads) or embed_dims % heads:
        raise CheckpointError(
            f'{embed_dims} channels cannot be split into {heads:g} heads; '
            'weights do not say how many there are: give --num-heads'
        )
    return Geometry(
        *sizes,
        num_heads=int(heads),
        patch_size=patch,
        in_channels=in_channels,
        img_size=(height, width),
        num_prefix=num_prefix,
        embeds_prefix=patches < length,
    )


def count_blocks(state: Mapping[str, Tensor]) -> int:
    """Number of ``blocks.*``; :func:`rename` finds gaps in them."""
    found = (re.match(r'blocks\.(\d+)\.', key) for key in state)
    return len({match[1] for match in found if match})


def rename(
    state: Mapping[str, Tensor],
    model: dict[str, Any],
    scope: str,
    names: Sequence[tuple[str, str]],
    what: str,
    ignored: tuple[str, ...],
) -> dict[str, Tensor]:
    """The entries of our model, which is built for its names and shapes.

    ``names`` are parts of our names and of the checkpoint's, those of blocks
    and embeddings aside; entries that begin with ``ignored`` are dropped.

    Raises:
        CheckpointError: On missing, misshapen or unexpected entries.
    """
    with DefaultScope.overwrite_default_scope(scope):
        models = import_module(f'{scope}.registry').MODELS
        entries = models.build(deepcopy(model)).state_dict()
    problems, renamed, rest = [], {}, dict(state)
    for new, entry in entries.items():
        old = new
        for ours, theirs in (*names, *_NAMES):
            old = old.replace(ours, theirs)
        value, expected = rest.pop(old, None), tuple(entry.shape)
        if value is None:
            problems.append(f'{old}: missing, expected {expected}')
        elif tuple(value.shape) != expected:
            got = tuple(value.shape)
            problems.append(f'{old}: got shape {got}, expected {expected}')
        elif not value.is_floating_point():
            problems.append(f'{old}: got {value.dtype}, expected floats')
        else:
            renamed[new] = value
    problems += [
        f'{key}: unexpected' for key in rest if not key.startswith(ignored)
    ]
    if problems and any(key.endswith('.merge_matrix') for key in state):
        raise CheckpointError(
            f'this {what} has merge matrices: it is compressed; use the kind '
            "'pm-vit' for a classifier or 'pm-segmenter'"
        )
    if problems:
        shown, more = '\n  '.join(problems[:12]), len(problems) - 12
        shown += f'\n  ... and {more} more' * (more > 0)
        raise CheckpointError(
            f'this is no {what} checkpoint, a damaged one or one of a variant '
            f'that is not supported:\n  {shown}\nDownload or copy it again if '
            'entries are missing; with unexpected ones the model differs from '
            'the plain architecture'
        )
    return renamed
