"""The hook together with what else mmengine can do in training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import dense_checkpoint, small_config
from mmengine.runner import Runner

from pm_seg.engine.scoring import compressible_modules
from pm_seg.utils.checkpoints import read_checkpoint

# mmengine compiles the whole step, optimiser included.
COMPILES_TRAINING = pytest.mark.skipif(
    torch.__version__ < (2, 5) or (2, 14) <= torch.__version__ < (2, 15),
    reason='torch 2.4 and 2.14 cannot compile the step of an optimizer',
)


def ema(cfg) -> None:
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.5))


def ema_with_buffers(cfg) -> None:
    cfg.custom_hooks.append(
        dict(type='EMAHook', momentum=0.5, update_buffers=True)
    )


def accumulation(cfg) -> None:
    cfg.optim_wrapper.accumulative_counts = 2


def compiled(cfg) -> None:
    cfg.compile = dict(backend='eager')
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=1e-3, weight_decay=0.0)
    cfg.model.decode_head.num_layers = 1


def layer_decay(cfg) -> None:
    cfg.optim_wrapper.constructor = 'PMLayerDecayOptimWrapperConstructor'
    cfg.optim_wrapper.paramwise_cfg = dict(
        decay_rate=0.7, compressor_lr_mult=2.0
    )


def by_epoch(cfg) -> None:
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.train_dataloader.batch_size = 6
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
    cfg.log_processor = dict(by_epoch=True)


def paper(cfg) -> None:
    cfg.model.backbone.compression = dict(type='paper', prune_rate=0.1)
    cfg.custom_hooks[0].score_batches = 1


def paper_dense_matrices(cfg) -> None:
    paper(cfg)
    cfg.model.backbone.compression.update(matrices='dense', num_groups=[8, 8])


def tome(cfg) -> None:
    cfg.model.backbone.compression = dict(type='tome', keep=0.8)


def target(cfg) -> None:
    cfg.custom_hooks[0].target = dict(share=0.8)


def distilled(cfg) -> None:
    folder = Path(cfg.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cfg.load_from = dense_checkpoint(cfg, folder)
    cfg.model.teacher = dict(alpha=0.5, tau=20.0)


def distilled_ema(cfg) -> None:
    distilled(cfg)
    ema(cfg)


def evaluated(cfg) -> None:
    cfg.custom_hooks[0].evaluate = True


@pytest.mark.parametrize(
    'option',
    [
        ema,
        ema_with_buffers,
        accumulation,
        pytest.param(compiled, marks=COMPILES_TRAINING),
        layer_decay,
        by_epoch,
        paper,
        paper_dense_matrices,
        tome,
        target,
        distilled,
        distilled_ema,
        evaluated,
    ],
)
def test_trains_and_loads(option, scenes: Path, tmp_path: Path) -> None:
    """Two steps, a checkpoint, and the checkpoint gives the same maps."""
    cfg = small_config(scenes, tmp_path)
    option(cfg)
    runner = Runner.from_cfg(cfg)
    model = runner.train()
    model.eval()
    modules = compressible_modules(model)
    assert modules
    assert all(m.compressor.compressed for m in modules.values())
    (path,) = [*tmp_path.glob('iter_2.pth'), *tmp_path.glob('epoch_1.pth')]
    saved = read_checkpoint(path)
    assert not any('teacher' in key for key in saved['state_dict'])
    key = 'ema_state_dict'
    if 'ema' in option.__name__:
        assert key in saved
        # With EMA the averaged weights are saved as the model's.
        compressor = model.backbone.compressor
        for name in ('shares', 'comparison.importance', 'settled'):
            value = saved[key][f'module.backbone.compressor.{name}']
            assert torch.equal(value, compressor.get_buffer(name)), name
    other = runner.build_model(cfg.model)
    other.load_state_dict(saved['state_dict'])
    other.eval()
    images = torch.randn(1, 3, 64, 64)
    if 'ema' not in option.__name__:
        with torch.no_grad():
            torch.testing.assert_close(
                other(images, mode='tensor'), model(images, mode='tensor')
            )
    else:
        assert torch.isfinite(other(images, mode='tensor')).all()
