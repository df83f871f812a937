"""Models of other code bases for the converters' tests.

A plain Vision Transformer and Segmenter as functions of a state dict with
timm's names, written from their papers, and random weights for them.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import mmpretrain.models  # noqa: F401
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from mmseg.registry import MODELS as SEG_MODELS
from torch import Tensor, nn

from pm_seg.core import Compressor, EncoderShape, LayerCost, make_compressor

State = dict[str, Tensor]


def random_linear(name: str, rows: int, columns: int) -> State:
    return {
        f'{name}.weight': torch.randn(rows, columns) * columns**-0.5,
        f'{name}.bias': torch.randn(rows) * 0.1,
    }


def random_norm(name: str, dims: int) -> State:
    return {
        f'{name}.weight': 1 + 0.1 * torch.randn(dims),
        f'{name}.bias': 0.1 * torch.randn(dims),
    }


def random_blocks(depth: int, dims: int, ratio: int = 4) -> State:
    state = {}
    for i in range(depth):
        name = f'blocks.{i}'
        state |= random_norm(f'{name}.norm1', dims)
        state |= random_linear(f'{name}.attn.qkv', 3 * dims, dims)
        state |= random_linear(f'{name}.attn.proj', dims, dims)
        state |= random_norm(f'{name}.norm2', dims)
        state |= random_linear(f'{name}.mlp.fc1', ratio * dims, dims)
        state |= random_linear(f'{name}.mlp.fc2', dims, ratio * dims)
    return state


def random_vit(
    depth: int = 2,
    dims: int = 128,
    grid: tuple[int, int] = (3, 3),
    patch: int = 8,
    classes: int = 5,
    distilled: bool = False,
) -> State:
    """State dict of a timm classifier."""
    prefix = 1 + distilled
    state = {
        'cls_token': torch.randn(1, 1, dims),
        'pos_embed': torch.randn(1, prefix + grid[0] * grid[1], dims),
        'patch_embed.proj.weight': torch.randn(dims, 3, patch, patch) * 0.05,
        'patch_embed.proj.bias': torch.randn(dims) * 0.1,
        **random_blocks(depth, dims),
        **random_norm('norm', dims),
        **random_linear('head', classes, dims),
    }
    if distilled:
        state['dist_token'] = torch.randn(1, 1, dims)
        state |= random_linear('head_dist', classes, dims)
    return state


def random_segmenter(classes: int = 4, dims: int = 128, **kwargs) -> State:
    """State dict of the Segmenter repository, mask transformer."""
    decoder = {
        'cls_emb': torch.randn(1, classes, dims),
        'proj_patch': torch.randn(dims, dims) * dims**-0.5,
        'proj_classes': torch.randn(dims, dims) * dims**-0.5,
        **random_blocks(2, dims),
        **random_linear('proj_dec', dims, dims),
        **random_norm('decoder_norm', dims),
        **random_norm('mask_norm', classes),
    }
    encoder = random_vit(dims=dims, **kwargs)
    return {f'encoder.{key}': value for key, value in encoder.items()} | {
        f'decoder.{key}': value for key, value in decoder.items()
    }


def part(state: State, prefix: str) -> State:
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f'{name}.weight'], state.get(f'{name}.bias'))


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    weight, bias = state[f'{name}.weight'], state[f'{name}.bias']
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def run_block(s: State, i: int, x: Tensor, heads: int, eps: float) -> Tensor:
    batch, tokens, dims = x.shape
    name = f'blocks.{i}'
    qkv = linear(s, f'{name}.attn.qkv', norm(s, f'{name}.norm1', x, eps))
    qkv = qkv.view(batch, tokens, 3, heads, dims // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * (dims // heads) ** -0.5).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(x.shape)
    out = linear(s, f'{name}.attn.proj', out)
    x = x + out * s.get(f'{name}.ls1.gamma', 1.0)
    hidden = F.gelu(
        linear(s, f'{name}.mlp.fc1', norm(s, f'{name}.norm2', x, eps))
    )
    out = linear(s, f'{name}.mlp.fc2', hidden)
    return x + out * s.get(f'{name}.ls2.gamma', 1.0)


def run_blocks(s: State, x: Tensor, heads: int, eps: float) -> Tensor:
    """All blocks; compressed ones merge, restore and keep pruned tokens."""
    depth = len({key.split('.')[1] for key in s if key.startswith('blocks.')})
    for i in range(depth):
        where = next(
            (
                name
                for name in (f'blocks.{i}', f'blocks.{i}.attn')
                if f'{name}.merge_matrix' in s
            ),
            None,
        )
        if where is None:
            x = run_block(s, i, x, heads, eps)
            continue
        y = run_block(s, i, s[f'{where}.merge_matrix'] @ x, heads, eps)
        kept = 1 - s[f'{where}.token_mask'][:, None]
        x = s[f'{where}.recover_matrix'] @ y + kept * x
    return x


def run_encoder(s: State, image: Tensor, heads: int, eps: float) -> Tensor:
    """Tokens (B, P+N, C) before the last normalisation."""
    weight = s['patch_embed.proj.weight']
    bias = s.get('patch_embed.proj.bias')
    x = F.conv2d(image, weight, bias, stride=weight.shape[-1])
    x = x.flatten(2).mT
    prefix = [s[k] for k in ('cls_token', 'dist_token') if k in s]
    positions = s['pos_embed']
    if positions.shape[1] == x.shape[1]:
        x = x + positions
    x = torch.cat([*(t.expand(len(x), -1, -1) for t in prefix), x], 1)
    if positions.shape[1] == x.shape[1]:
        x = x + positions
    return run_blocks(s, x, heads, eps)


def run_vit(s: State, image: Tensor, heads: int) -> Tensor:
    """Logits (B, classes) of a timm classifier."""
    x = run_encoder(s, image, heads, 1e-6)
    if 'fc_norm.weight' in s:
        pooled = norm(s, 'fc_norm', x[:, 1:].mean(1), 1e-6)
        return linear(s, 'head', pooled)
    x = norm(s, 'norm', x, 1e-6)
    cls = x[:, 0]
    if 'pre_logits.fc.weight' in s:
        cls = linear(s, 'pre_logits.fc', cls).tanh()
    logits = linear(s, 'head', cls)
    if 'dist_token' in s:
        logits = (logits + linear(s, 'head_dist', x[:, 1])) / 2
    return logits


def run_segmenter(s: State, image: Tensor, heads: int) -> Tensor:
    """Mask logits (B, classes, h, w) on the patch grid."""
    encoder, decoder = part(s, 'encoder.'), part(s, 'decoder.')
    patch = encoder['patch_embed.proj.weight'].shape[-1]
    grid = [size // patch for size in image.shape[2:]]
    x = run_encoder(encoder, image, heads, 1e-5)
    x = norm(encoder, 'norm', x, 1e-5)[:, 1:]
    if 'head.weight' in decoder:
        masks = linear(decoder, 'head', x)
        return masks.mT.reshape(len(image), -1, *grid)
    classes = decoder['cls_emb'].expand(len(x), -1, -1)
    count = classes.shape[1]
    x = torch.cat([linear(decoder, 'proj_dec', x), classes], 1)
    x = norm(
        decoder, 'decoder_norm', run_blocks(decoder, x, heads, 1e-5), 1e-5
    )
    patches = F.normalize(x[:, :-count] @ decoder['proj_patch'], dim=-1)
    classes = F.normalize(x[:, -count:] @ decoder['proj_classes'], dim=-1)
    masks = norm(decoder, 'mask_norm', patches @ classes.mT, 1e-5)
    return masks.mT.reshape(len(image), -1, *grid)


def random_matrices(
    keys: list[str], tokens: int, slots: int, pruned: int = 0, prefix: int = 1
) -> State:
    """Trained matrices of blocks with these names: values everywhere."""
    state = {}
    for key in keys:
        merge = 0.05 * torch.randn(slots, tokens)
        recover = 0.05 * torch.randn(tokens, slots)
        for token in range(tokens):
            slot = token if token < prefix else prefix
            if token >= prefix:
                slot += (
                    (token - prefix) * (slots - prefix) // (tokens - prefix)
                )
            merge[slot, token] += 0.7
            recover[token, slot] += 1
        mask = torch.ones(tokens)
        mask[prefix : prefix + pruned] = 0
        state[f'{key}.merge_matrix'] = merge
        state[f'{key}.recover_matrix'] = recover
        state[f'{key}.token_mask'] = mask
    return state


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def build_segmentor(model: dict, state: State) -> nn.Module:
    """The model of a converted config, every entry loaded."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        built = SEG_MODELS.build(deepcopy(model))
    built.load_state_dict(state)
    return built.eval()


def build_classifier(model: dict, state: State) -> Callable[[Tensor], Tensor]:
    """Images to logits by a converted config, every entry loaded.

    Where pm_seg has no classifiers, by mmpretrain's stock backbone with the
    compressor run on its layers.
    """
    model, state = deepcopy(model), dict(state)
    backbone = model['backbone']
    name = backbone['type']
    stock = name not in MODELS.module_dict
    compressor = None
    if stock:
        backbone['type'] = name.removeprefix('PM')
        options = backbone.pop('compression', None)
        if options is not None:
            compressor, state = _split_compressor(backbone, options, state)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        built = MODELS.build(model)
    built.load_state_dict(state)
    built.eval()

    def run(image: Tensor) -> Tensor:
        if compressor is None:
            return built(image, mode='tensor')
        vit = built.backbone
        x, grid = vit.patch_embed(image)
        tokens = [vit.cls_token, getattr(vit, 'dist_token', None)]
        tokens = [t.expand(len(x), -1, -1) for t in tokens if t is not None]
        x = torch.cat([*tokens, x], 1) + vit.pos_embed
        x = compressor.run(vit.layers, x, tuple(grid)).last
        out = vit._format_output(vit.ln1(x), grid)
        return built.head((out,))

    return torch.no_grad()(run)


def _split_compressor(
    backbone: dict, options: dict, state: State
) -> tuple[Compressor, State]:
    grid = tuple(n // backbone['patch_size'] for n in backbone['img_size'])
    layers = part(state, 'backbone.layers.')
    _, positions, dims = state['backbone.pos_embed'].shape
    shape = EncoderShape(
        depth=len({key.split('.')[0] for key in layers}),
        grid=grid,
        num_prefix=positions - grid[0] * grid[1],
        dims=dims,
        key_dims=dims,
        cost=LayerCost(0, 0, 0),
    )
    compressor = make_compressor(options, shape)
    compressor.load_state_dict(part(state, 'backbone.compressor.'))
    rest = {
        key: value for key, value in state.items() if '.compressor.' not in key
    }
    return compressor, rest
