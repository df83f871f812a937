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

#: What a checkpoint of something else is by the start of a key of it.
_FOREIGN = (
    (
        'encoder.blocks.',
        "it looks like a Segmenter: use the kind 'segmenter', or if it has "
        "merge matrices use the kind 'pm-segmenter'",
    ),
    (
        'backbone.',
        'it looks like an OpenMMLab checkpoint, which loads as it is: change '
        "the type in its config to 'PMVisionTransformer'",
    ),
    (
        'Transformer/',
        'it has the names of the JAX original: load it with timm and save '
        "the weights, torch.save(model.state_dict(), 'vit.pth')",
    ),
    ('blocks.', 'it seems to be incomplete: download or copy it again'),
)


def shape_of(
    state: Mapping[str, Tensor], key: str, dims: int, what: str
) -> tuple[int, ...]:
    """Shape of an entry that sizes are taken from.

    Raises:
        CheckpointError: If it is not there or does not have ``dims``
            dimensions of at least 1.
    """
    if key not in state:
        advice = (
            text
            for start, text in _FOREIGN
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
    """Sizes of a Vision Transformer.

    Attributes:
        embed_dims, num_layers, hidden_dims, num_heads (int): C, depth,
            channels of the feed-forward layers, heads.
        patch_size, in_channels (int): Of the patch embedding.
        img_size (tuple[int, int]): What the position embedding is for.
        num_prefix (int): 1, or 2 with a distillation token.
        embeds_prefix (bool): Whether prefix tokens have positions.
    """

    embed_dims: int
    num_layers: int
    hidden_dims: int
    num_heads: int
    patch_size: int
    in_channels: int
    img_size: tuple[int, int]
    num_prefix: int
    embeds_prefix: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns."""
        height, width = self.img_size
        return height // self.patch_size, width // self.patch_size


def read_geometry(
    state: Mapping[str, Tensor], hints: Hints, what: str
) -> Geometry:
    """Sizes of the Vision Transformer that a state dict is of.

    Args:
        state (dict[str, Tensor]): With timm's names.
        hints (Hints): Override what is guessed; checked against the shapes.
        what (str): What was expected, for messages.

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
    heads = hints.num_heads
    if heads is None:
        heads = ARCHS[sizes][1] if sizes in ARCHS else embed_dims / _HEAD_DIMS
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
        CheckpointError: On missing, misshapen or unexpected entries.
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
