"""mmseg's own ViT configs with nothing but the backbone's type changed."""

from __future__ import annotations

from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

import pm_seg  # noqa: F401

#: Configs as installed. The forks cannot resolve 'mmseg::vit/...', which
#: looks the package up by another name, so they are opened by path.
STOCK = Path(mmseg.__file__).parent / '.mim/configs'
CONFIGS = [
    'vit/vit_vit-b16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py',
    'vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py',
    'vit/vit_deit-s16_upernet_8xb2-80k_ade20k-512x512.py',
    'setr/setr_vit-l_naive_8xb2-160k_ade20k-512x512.py',
    'setr/setr_vit-l_pup_8xb2-160k_ade20k-512x512.py',
    'setr/setr_vit-l-mla_8xb1-160k_ade20k-512x512.py',
    'segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py',
]
SIZE = 64


def shrink(node: dict, width: int, pyramid: int) -> None:
    """Fewer channels everywhere below the backbone."""
    for value in node.values():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                shrink(part, width, pyramid)
    for key in ('in_channels', 'out_channels'):
        known = {384: width, 768: width, 1024: width, 256: pyramid}
        value = node.get(key)
        if isinstance(value, int):
            node[key] = known[value]
        elif value is not None:
            node[key] = [known[v] for v in value]
    if 'channels' in node:  # heads without a convolution keep the number
        same = node.get('num_convs') == 0
        node['channels'] = node['in_channels'] if same else 16
    if 'num_classes' in node:
        node['num_classes'] = 8
    if 'mla_channels' in node:
        node['mla_channels'] = 4


def stock_model(name: str, small: bool) -> Config:
    """The model of a stock config, as it is or quick to run."""
    if not (STOCK / name).exists():
        pytest.skip(f'the installed mmseg has no {name}')
    model = Config.fromfile(STOCK / name).model
    model.pretrained = None
    model.backbone.pop('init_cfg', None)  # downloads
    if small:
        levels = len(model.backbone.get('out_indices', (11,)))
        model.backbone.update(
            img_size=(SIZE, SIZE),
            embed_dims=24,
            num_heads=3,
            num_layers=4,
            out_indices=list(range(4))[-levels:],
        )
        model.data_preprocessor.size = (SIZE, SIZE)
        model.test_cfg = dict(mode='whole')
        for part in ('neck', 'decode_head', 'auxiliary_head'):
            shrink(dict(all=model.get(part)), width=24, pyramid=16)
    return model


def build(model: Config, seed: int = 0) -> nn.Module:
    init_default_scope('mmseg')
    torch.manual_seed(seed)
    return revert_sync_batchnorm(MODELS.build(model))


def batch(model: nn.Module, size: int) -> dict:
    image = torch.randint(0, 255, (3, size, size)).byte()
    label = torch.randint(0, 8, (1, size, size))
    sample = SegDataSample(gt_sem_seg=PixelData(data=label))
    # Heads average over images and positions in their norms: two at least.
    data = dict(inputs=[image, image.flip(1)], data_samples=[sample] * 2)
    return model.data_preprocessor(data, training=True)


def check_stock(name: str, small: bool) -> None:
    config = stock_model(name, small)
    size = config.backbone.img_size[0]
    dense = build(config).eval()
    for parameter in dense.parameters():  # position embeddings start at 0
        parameter.data += 0.02 * torch.randn_like(parameter)
    image = torch.randn(1, 3, size, size)

    config.backbone.type = 'PMVisionTransformer'  # was VisionTransformer
    same = build(config, seed=1).eval()
    same.load_state_dict(dense.state_dict())
    with torch.no_grad():
        expected = dense(image, mode='tensor')
        got = same(image, mode='tensor')
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= 1e-5 * scale

    config.backbone.compression = dict(keep=0.6)
    model = build(config, seed=2)
    model.load_state_dict(dense.state_dict())
    compressor = model.backbone.compressor
    assert compressor.share <= 0.6
    with torch.no_grad():
        maps, full = model.eval().backbone(image), dense.backbone(image)
        assert [m.shape for m in maps] == [m.shape for m in full]
        first = compressor.schedule.first
        for level, index in enumerate(model.backbone.out_indices):
            error = (maps[level] - full[level]).abs().max()
            changed = error > 1e-5 * full[level].abs().max()
            assert changed == (index >= first)
        assert model(image, mode='tensor').shape == expected.shape
        with compressor.disabled():
            same = model(image, mode='tensor')
        assert (same - expected).abs().max() <= 1e-5 * scale
    data = batch(model.train(), size)
    losses = model(**data, mode='loss')
    model.parse_losses(losses)[0].backward()
    silent = [
        key
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all())
        # mmseg builds a cls token and a classifier that nobody asks for.
        and key not in ('backbone.cls_token', 'decode_head.conv_seg.weight')
        and key != 'decode_head.conv_seg.bias'
    ]
    assert not silent
    for key in ('patch_embed.projection.weight', 'compressor.gain'):
        assert model.backbone.get_parameter(key).grad.abs().max() > 0


@pytest.mark.parametrize('name', CONFIGS)
def test_stock_config(name: str) -> None:
    """Small: the same numbers dense; full-size maps and gradients at 0.6."""
    check_stock(name, small=True)


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_stock_config_in_full(name: str) -> None:
    """The sizes of the papers, up to ViT-L at 512x512."""
    check_stock(name, small=False)
