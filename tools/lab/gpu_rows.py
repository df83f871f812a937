"""What the GPU report measures: correctness, speed, accuracy, row by row."""

from __future__ import annotations

import argparse
import copy
import gc
from functools import cache
from pathlib import Path
from typing import NamedTuple

import camvid_table
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from pm_seg.cli import compress, test, train
from pm_seg.cli.bench_measure import device_name, measure
from pm_seg.cli.bench_models import DENSE, METHODS, build_models, image_size
from pm_seg.cli.config import resolve_config
from pm_seg.core import GroupRecorder
from pm_seg.engine.scoring import full_products
from pm_seg.utils import count_macs


class Setting(NamedTuple):
    """A model on images of its config's size.

    Attributes:
        config (str): Its config, of a compressed model.
        batch (int): Images at a time.
        timm (str): What timm calls the dense model, '' for none.
    """

    config: str
    batch: int
    timm: str = ''


_S, _B, _L = (f'segmenter_vit-{size}_pm_ade20k.py' for size in 'sbl')
_DEIT = 'classification/deit-{}_pm_in1k.py'
SETTINGS = {
    'Seg-S 512, batch 32': Setting(_S, 32),
    'Seg-S 512, batch 1': Setting(_S, 1),
    'Seg-B 512, batch 32': Setting(_B, 32),
    'Seg-L 640, batch 8': Setting(_L, 8),
    'Seg-L 640, batch 1': Setting(_L, 1),
    'DeiT-S 224, batch 256': Setting(
        _DEIT.format('small'), 256, 'deit_small_patch16_224'
    ),
    'DeiT-B 224, batch 256': Setting(
        _DEIT.format('base'), 256, 'deit_base_patch16_224'
    ),
    'Seg-T 352x480, batch 32': Setting('segmenter_vit-t_pm_camvid.py', 32),
}
CIFAR = 'classification/vit-tiny_{}cifar10.py'
CIFAR_ROWS = ('dense', 'ours 60%', 'ToMe-style 60%')
TIMM, TOME = 'timm dense', 'ToMe itself'


class Plain(nn.Module):
    """A timm model as benchmarks call it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mode: str = 'tensor') -> Tensor:
        return self.model(images)


def read_config(setting: Setting, tiny: bool) -> Config:
    """Config of a setting, a few narrow layers if it is to be tiny."""
    cfg = Config.fromfile(resolve_config(setting.config))
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    if tiny:
        backbone, head = cfg.model.backbone, cfg.model.get('decode_head')
        backbone.img_size = (96, 96)
        backbone.compression = dict(type='pm', keep=0.9, first=0)
        if head is None:
            sizes = dict(embed_dims=48, num_layers=4, num_heads=3)
            backbone.arch = dict(sizes, feedforward_channels=96)
            cfg.model.head.in_channels = 48
        else:
            backbone.update(embed_dims=48, num_layers=4, num_heads=3)
            head.update(in_channels=48, channels=48, embed_dims=48)
            head.num_heads = 3
    return cfg


@cache
def _state(config: str, tiny: bool) -> dict[str, Tensor]:
    """Random weights, the same for all rows of a config."""
    cfg = read_config(Setting(config, 1), tiny)
    models, _ = build_models(cfg, image_size(cfg), [], keep=0.9)
    return models[DENSE].state_dict()


def build(setting: Setting, name: str, tiny: bool) -> nn.Module | str:
    """The model of a row such as 'ours 50%', or why there is none."""
    if name in (TIMM, TOME):
        return _timm_model(setting, name, 96 if tiny else 224)
    cfg = read_config(setting, tiny)
    state = _state(setting.config, tiny)
    if name == DENSE:
        return build_models(cfg, image_size(cfg), [], 0.9, state)[0][DENSE]
    method, keep = _method(name)
    try:
        found, missing = build_models(
            cfg, image_size(cfg), [method], keep, state
        )
    except ValueError as error:
        return str(error)
    return found.get(method, missing.get(method))


def _method(name: str) -> tuple[str, float]:
    """Of a row such as 'ours 50%': ('ours', 0.5)."""
    method, _, share = name.rpartition(' ')
    return method, float(share.rstrip('%')) / 100


def _timm_model(setting: Setting, name: str, size: int) -> nn.Module | str:
    try:
        import timm

        model = timm.create_model(setting.timm, img_size=size)
        if name == TOME:
            import tome

            tome.patch.timm(model)
            model.r = 13
    except ImportError as error:
        return f'{error}; install it to have this row'
    return Plain(model)


def speed_row(
    args: argparse.Namespace, setting: str, mode: str, train: bool, name: str
) -> dict:
    """Time, memory and operations of one model."""
    given = SETTINGS[setting]
    model = build(given, name, args.tiny)
    if isinstance(model, str):
        return dict(unreachable=model)
    batch = 2 if args.tiny else given.batch
    size = image_size(read_config(given, args.tiny))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, *size, generator=generator)
    model.eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        probe = torch.zeros(1, 3, *size)
        macs = count_macs(lambda: model(probe, mode='tensor'))
    (row,) = measure(
        {name: model}, images, 'bf16', mode, train, args.rounds, args.device
    )
    compressor = getattr(getattr(model, 'backbone', None), 'compressor', None)
    share = 1.0 if compressor is None else compressor.share
    return {**row, 'share': share, 'gmacs': macs / 1e9}


@torch.no_grad()
def check_row(args: argparse.Namespace, name: str) -> dict:
    """One model on the CPU and on the device, and there in bfloat16.

    Errors are the largest ones, as a share of the largest output; 'same' is
    the share of tokens in the group of the CPU.
    """
    setting = Setting(_S, 1)
    model = build(setting, name, args.tiny)
    if isinstance(model, str):
        return dict(unreachable=model)
    model.eval()
    size = image_size(read_config(setting, args.tiny))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, generator=generator)
    with full_products():
        expected, groups = _outputs(model, images)
        there = copy.deepcopy(model).to(args.device)
        found, others = _outputs(there, images.to(args.device))
        half, halves = _outputs(
            there.bfloat16(), images.to(args.device).bfloat16()
        )
    scale = expected.abs().max()
    error = ((found - expected).abs().max() / scale).item()
    same = _same(groups, others)
    # A tie that falls otherwise changes a few tokens, an error all of them.
    typical = ((found - expected).abs().median() / scale).item()
    return dict(
        error=error,
        same=same,
        bf16_error=((half - expected).abs().median() / scale).item(),
        bf16_same=_same(groups, halves),
        ok=typical < 1e-4 and same > 0.99,
    )


def _outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    with GroupRecorder(model.backbone.compressor) as recorder:
        out = model(images, mode='tensor')
    return out.float().cpu(), recorder.groups


def _same(groups: list[Tensor], others: list[Tensor]) -> float:
    equal = [(a == b).float().mean() for a, b in zip(groups, others)]
    return torch.stack(equal).mean().item()


def accuracy_row(args: argparse.Namespace, name: str, seed: int) -> dict:
    """Fine-tune on CamVid as tools/lab/camvid_table.py does, and test."""
    if args.tiny:
        row = camvid_table.ROWS[name]
        small = ('train_dataloader.batch_size=1', 'model.teacher=None')
        extra = ('--calib-batches', '1', '--score-batches', '1')
        camvid_table.ROWS[name] = row._replace(
            options=(*row.options, *small[: 2 if row.compress else 1]),
            compress=(*row.compress, *extra) if row.compress else (),
        )
    table_args = camvid_table.parse_args(
        [
            '--data', str(args.data / 'camvid'),
            '--checkpoint', str(args.checkpoint),
            '--work-dir', str(args.out / 'camvid'),
            '--iters', '2' if args.tiny else '700',
            '--workers', str(args.workers),
        ]
    )  # fmt: skip
    return camvid_table.run_row(table_args, name, seed)


def cifar_row(args: argparse.Namespace, name: str) -> dict:
    """Fine-tune on CIFAR-10 for three epochs, compressed ones from dense."""
    work, epochs = args.out / 'cifar', 1 if args.tiny else 3
    dense = work / 'dense' / f'epoch_{epochs}.pth'
    weights = args.data / 'vit-tiny_in1k.pth'
    options = [
        '--cfg-options', 'log_level=ERROR',
        f'data_root={args.data / "cifar10"}',
        f'train_cfg.max_epochs={epochs}',
        f'param_scheduler.0.end={epochs}',
        *camvid_table.loader_options(args.workers),
    ]  # fmt: skip
    if args.tiny:
        options.append('train_dataloader.batch_size=4')
    start = ['model.backbone.init_cfg.checkpoint=' + str(weights)]
    config, folder, checkpoint = CIFAR.format(''), work / 'dense', dense
    if name != DENSE:
        method, keep = _method(name)
        folder = work / method
        config, checkpoint = CIFAR.format('pm_'), folder / dense.name
        options += [
            f'model.backbone.compression.type={METHODS[method]}',
            f'model.teacher.checkpoint={dense}',
        ]
        first = folder / 'start.pth'
        compress.main(
            [
                config, str(dense), '--out', str(first), '--keep', str(keep),
                *(['--calib-batches', '1'] if args.tiny else []), *options,
            ]
        )  # fmt: skip
        start = [f'load_from={first}']
    train.main([config, '--work-dir', str(folder), *options, *start])
    metrics = test.main(
        [config, str(checkpoint), '--work-dir', str(folder), *options]
    )
    return dict(top1=float(metrics['accuracy/top1']))


def release(device: str) -> None:
    """Forget what a row compiled and held."""
    gc.collect()
    torch._dynamo.reset()
    if torch.device(device).type == 'cuda':
        torch.cuda.empty_cache()


def about(args: argparse.Namespace) -> dict:
    """Where rows were made."""
    return dict(
        device=device_name(args.device), torch=torch.__version__.split('+')[0]
    )


def default_checkpoint(data: Path) -> Path:
    """The dense Segmenter in a data folder."""
    return data / 'segmenter_vit-t_camvid.pth'
