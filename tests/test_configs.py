"""Shipped configs build and agree with mmseg's own."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

import mmseg
import pytest
import torch
from helpers import ROOT
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import init_default_scope
from mmengine.utils import to_2tuple
from mmseg.registry import MODELS
from torch import nn

CONFIGS = sorted(
    str(path.relative_to(ROOT / 'configs'))
    for path in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in path.parts
)
CLASSIFIERS = [n for n in CONFIGS if n.startswith('classification/')]
SEGMENTERS = [n for n in CONFIGS if n not in CLASSIFIERS]
HUGE = ('vit-b', 'vit-l', 'deit-b', 'v2-b', 'v3-b', 'siglip2-b', 'upernet')


def read(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / name)


def test_the_promised_configs_are_there() -> None:
    for size in 'tsbl':
        assert f'segmenter_vit-{size}_ade20k.py' in CONFIGS
        assert f'segmenter_vit-{size}_pm_ade20k.py' in CONFIGS
        assert f'segmenter_vit-{size}_pm-paper_ade20k.py' in CONFIGS
    assert 'segmenter_vit-t_camvid.py' in CONFIGS
    assert 'segmenter_vit-t_pm_camvid.py' in CONFIGS
    for size in 'sl':
        for data in ('cityscapes', 'pascal_context'):
            assert f'segmenter_vit-{size}_{data}.py' in CONFIGS
            assert f'segmenter_vit-{size}_pm_{data}.py' in CONFIGS
    for model in ('dinov2-s', 'dinov2-b', 'dinov3-s', 'dinov3-b'):
        for head in ('linear', 'segmenter'):
            assert f'{head}_{model}_ade20k.py' in CONFIGS
            assert f'{head}_{model}_pm_ade20k.py' in CONFIGS
    assert 'upernet_eva02-s_ade20k.py' in CONFIGS
    assert 'upernet_eva02-s_pm_ade20k.py' in CONFIGS
    for name in (
        'deit-tiny', 'deit-small', 'deit-base', 'vit-base-mae',
        'siglip2-base',
    ):  # fmt: skip
        assert f'classification/{name}_pm_in1k.py' in CONFIGS
    for data in ('cifar10', 'in1k_samples'):
        assert f'classification/vit-tiny_{data}.py' in CONFIGS
        assert f'classification/vit-tiny_pm_{data}.py' in CONFIGS


@pytest.mark.parametrize('name', CONFIGS)
def test_builds_and_runs(name: str) -> None:
    if any(size in name for size in HUGE):
        pytest.skip('built by the slow test')
    build_and_run(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', [n for n in CONFIGS if any(size in n for size in HUGE)]
)
def test_builds_and_runs_huge(name: str) -> None:
    build_and_run(name)


def build_and_run(name: str) -> None:
    if name in CLASSIFIERS:
        build_and_classify(name)
        return
    cfg = read(name)
    init_default_scope(cfg.default_scope)
    cfg.model.pretrained = None
    model = MODELS.build(cfg.model).eval()
    size = cfg.model.data_preprocessor.size
    prepare(model.backbone, name)
    with torch.no_grad():
        out = model(torch.zeros(1, 3, *size))
    classes = cfg.model.decode_head.num_classes
    patch = to_2tuple(model.backbone.patch_size)[0]
    scale = 4 if 'upernet' in name else 1
    grid = [scale * length // patch for length in size]
    assert out.shape == (1, classes, *grid)
    crop = next(
        step.crop_size
        for step in cfg.train_dataloader.dataset.pipeline
        if step.type == 'RandomCrop'
    )
    assert tuple(crop) == tuple(size)
    if name != 'demo/segmenter_scenes.py':  # trained on quarters of images
        assert tuple(size) == tuple(model.backbone.img_size)
    if model.test_cfg.mode == 'slide':
        assert tuple(model.test_cfg.crop_size) == tuple(size)


def prepare(backbone: nn.Module, name: str) -> None:
    """Compressed as the file's name says, and ready to run."""
    compressor = backbone.compressor
    assert (compressor is not None) == ('_pm' in name)
    if compressor is None:
        return
    assert compressor.needs_scores == ('_pm-paper_' in name)
    if compressor.needs_scores:
        compressor.set_scores(torch.rand_like(compressor.scores) + 0.1)
    else:
        assert 0.4 <= compressor.share <= compressor.keep <= 0.8


def build_and_classify(name: str) -> None:
    pytest.importorskip('mmpretrain')
    cfg = read(name)
    assert cfg.default_scope == 'mmpretrain'
    init_default_scope(cfg.default_scope)
    model = ROOT_MODELS.build(cfg.model).eval()
    prepare(model.backbone, name)
    with torch.no_grad():
        out = model(torch.zeros(1, 3, 224, 224))
    assert out.shape == (1, cfg.model.head.num_classes)
    for split in ('train', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        Compose(dataset.pipeline)  # every transform is registered
        assert dataset.data_root == cfg.data_root, 'one place to change it'


@pytest.mark.parametrize('name', [n for n in SEGMENTERS if '_pm_' in n])
def test_pm_configs_differ_from_their_dense_twin_in_compression(name) -> None:
    pm, dense = read(name).model, read(name.replace('_pm_', '_')).model
    assert pm.backbone.pop('compression') and 'compression' not in dense
    dense.pop('pretrained', None)
    dense.backbone.pop('pretrained', None)
    assert pm.pop('type') == 'Distilled' + dense.pop('type')
    teacher = pm.pop('teacher')
    if 'demo' not in name:
        assert teacher == dict(alpha=1.0, tau=20.0), 'the paper'
    else:  # trained on quarters of images, fine-tuned on whole ones
        pm.data_preprocessor.size = dense.data_preprocessor.size
    assert pm == dense


@pytest.mark.parametrize('name', [n for n in CONFIGS if '_pm-paper_' in n])
def test_the_papers_configs_are_ours_with_its_compression(name: str) -> None:
    """At its rates: a global threshold and pruning in classifiers."""
    paper, ours = read(name), read(name.replace('_pm-paper_', '_pm_'))
    found = paper.model.backbone.pop('compression')
    ours.model.backbone.pop('compression')
    assert paper.to_dict() == ours.to_dict()
    if name in SEGMENTERS:
        layers = list(range(1, paper.model.backbone.num_layers))
        expected = dict(keep_rate=0.7, threshold='layer', layers=layers)
    else:
        small = 'tiny' in name or 'small' in name
        expected = dict(
            keep_rate=0.7 if small else 0.6,
            prune_rate=0.1,
            threshold='global',
            decay=0.025,
        )
    assert found == dict(type='paper', **expected)


@pytest.mark.parametrize(
    'name',
    [
        n
        for n in CLASSIFIERS
        if 'vit-tiny_pm' in n or 'siglip2' in n and '_pm' in n
    ],
)
def test_pm_classifiers_differ_from_their_dense_twin(name: str) -> None:
    pm, dense = read(name), read(name.replace('_pm_', '_'))
    assert pm.model.backbone.pop('compression')
    assert pm.model.pop('teacher') == dict(alpha=1.0, tau=1.0)
    assert pm.model.pop('type') == 'Distilled' + dense.model.pop('type')
    dense.model.backbone.pop('init_cfg', None)
    dense.model.backbone.pop('pretrained', None)
    assert pm.model == dense.model
    assert pm.train_dataloader == dense.train_dataloader
    assert pm.test_dataloader == dense.test_dataloader


@pytest.mark.parametrize(
    'name',
    [n for n in CLASSIFIERS if '_in1k.py' in n and 'siglip2' not in n],
)
def test_classifiers_are_those_of_mmpretrain(name: str) -> None:
    """Architecture, pre-processing and checkpoint."""
    mmpretrain = pytest.importorskip('mmpretrain')
    kind = Path(name).name.split('_pm')[0]
    stock_name = {
        'deit-tiny': 'deit/deit-tiny_4xb256',
        'deit-small': 'deit/deit-small_4xb256',
        'deit-base': 'deit/deit-base_16xb64',
        'vit-base-mae': 'mae/benchmarks/vit-base-p16_8xb128-coslr-100e',
    }[kind] + '_in1k.py'
    folder = Path(mmpretrain.__path__[0]) / '.mim' / 'configs'
    if not (folder / stock_name).is_file():
        pytest.skip('this mmpretrain ships other configs')
    ours, stock = read(name), Config.fromfile(folder / stock_name)
    metafile = folder / stock_name.split('/')[0] / 'metafile.yml'
    assert urlparse(ours.load_from).path in metafile.read_text()
    a, b = ours.model, stock.model
    a.backbone.pop('compression')
    assert a.backbone.pop('type') == 'PM' + b.backbone.pop('type')
    a.backbone.setdefault('drop_path_rate', 0.0)
    b.backbone.setdefault('drop_path_rate', 0.0)
    b.backbone.pop('init_cfg', None)
    assert a.backbone == b.backbone
    for key in ('type', 'num_classes', 'in_channels'):
        assert a.head[key] == b.head[key]
    for key in ('mean', 'std', 'to_rgb'):
        assert a.data_preprocessor[key] == stock.data_preprocessor[key]
    steps = ours.test_dataloader.dataset.pipeline
    assert steps == stock.test_dataloader.dataset.pipeline
    assert ours.optim_wrapper.optimizer.lr == 1e-4
    assert ours.train_cfg.max_epochs == 30
    batch = ours.train_dataloader.batch_size * 8
    assert batch == ours.auto_scale_lr.base_batch_size


@pytest.mark.parametrize('size', 'tsbl')
def test_dense_models_are_those_of_mmseg(size: str) -> None:
    folder = Path(mmseg.__path__[0]) / '.mim' / 'configs' / 'segmenter'
    files = list(folder.glob(f'segmenter_vit-{size}_mask_*.py'))
    if not files:
        pytest.skip('this mmseg ships no configs')
    ours = read(f'segmenter_vit-{size}_ade20k.py')
    stock = Config.fromfile(files[0])
    a, b = ours.model, stock.model
    assert Path(a.pop('pretrained')).name == Path(b.pop('pretrained')).name
    assert a.backbone.pop('type') == 'PM' + b.backbone.pop('type')
    assert a.decode_head.pop('type') == 'PM' + b.decode_head.pop('type')
    for rate in ('attn_drop_rate', 'drop_rate'):
        assert b.backbone.pop(rate) == 0
    for cfg in (a, b):
        cfg.backbone.img_size = tuple(cfg.backbone.img_size)
        cfg.data_preprocessor.size = tuple(cfg.data_preprocessor.size)
    assert a == b
    for split in ('train', 'val'):
        ours_steps = [
            step
            for step in ours[f'{split}_dataloader'].dataset.pipeline
            if step.type != 'SeedAugmentation'
        ]
        stock_steps = stock[f'{split}_dataloader'].dataset.pipeline
        assert ours_steps == stock_steps


@pytest.mark.parametrize(
    'name', [n for n in CONFIGS if n.endswith('_pm_ade20k.py')]
)
def test_fine_tuning_follows_the_paper(name: str) -> None:
    """AdamW 1e-4, cosine, weight decay 1e-4, 50 epochs of 20210 images."""
    cfg = read(name)
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer == dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
    assert cfg.param_scheduler[-1].type == 'CosineAnnealingLR'
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
    images = cfg.train_cfg.max_iters * cfg.auto_scale_lr.base_batch_size
    assert images / 20210 == pytest.approx(50, rel=0.02)
    if 'vit-' in name:
        assert 'segmenter_vit-' in cfg.load_from
    else:
        dense = Path(name.replace('_pm_', '_')).stem
        assert cfg.load_from == f'work_dirs/{dense}/iter_40000.pth'
