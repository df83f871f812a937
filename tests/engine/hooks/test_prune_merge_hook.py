"""Training through the runner: scoring, compression, several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, dense_checkpoint, run_tool, small_config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS

from pm_seg.engine import PruneMergeHook
from pm_seg.engine.compression import compress
from pm_seg.engine.scoring import compressible_modules
from pm_seg.utils.checkpoints import read_checkpoint

# Imported by both processes; compares all weights and buffers over them.
COMPARE = """
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmseg.registry import HOOKS

torch.set_num_threads(1)

@HOOKS.register_module()
class CompareProcesses(Hook):
    priority = 'LOWEST'

    def after_train(self, runner):
        state = runner.model.module.state_dict()
        assert state['backbone.compressor.scores'].any()
        for key, value in state.items():
            copies = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(copies, value.contiguous())
            assert torch.equal(*copies), key
        runner.logger.info(f'IDENTICAL {len(state)}')
"""


def test_scores_compresses_and_trains(scenes: Path, tmp_path: Path) -> None:
    cfg = small_config(scenes, tmp_path)
    runner = Runner.from_cfg(cfg)
    model = runner.train()
    for module in compressible_modules(model).values():
        assert module.compressor.has_structure
    saved = read_checkpoint(tmp_path / 'iter_2.pth')
    scores = saved['state_dict']['backbone.compressor.scores']
    assert scores.shape == (2, 16) and (scores > 0).any()
    decay = {
        id(p): group['weight_decay']
        for group in runner.optim_wrapper.param_groups
        for p in group['params']
    }
    compressor = model.backbone.compressor
    assert decay[id(compressor.merge_weight)] == 0
    assert decay[id(model.backbone.pos_embed)] > 0


def test_keeps_the_structure_of_a_checkpoint(
    scenes: Path, tmp_path: Path
) -> None:
    cfg = small_config(scenes, tmp_path / 'first')
    group = Runner.from_cfg(cfg).train().backbone.compressor.group.clone()
    again = small_config(scenes, tmp_path / 'second')
    again.load_from = str(tmp_path / 'first' / 'iter_2.pth')
    again.model.backbone.compression.keep = 0.25
    model = Runner.from_cfg(again).train()
    assert torch.equal(model.backbone.compressor.group, group)


def test_scoring_does_not_shift_training(scenes, tmp_path) -> None:
    """The batches seen in training do not depend on how many were scored."""
    seen = []
    for score_iters in (1, 3):
        cfg = small_config(scenes, tmp_path / str(score_iters), iters=1)
        cfg.custom_hooks[0].score_iters = score_iters
        runner = Runner.from_cfg(cfg)
        losses = []
        step = runner.model.data_preprocessor.forward

        def watch(data, training=False, step=step, losses=losses):
            if training:
                inputs = torch.stack(data['inputs'])
                losses.append(inputs.double().sum().item())
            return step(data, training)

        runner.model.data_preprocessor.forward = watch
        runner.train()
        assert len(losses) == score_iters + 2 + 1  # two to calibrate
        seen.append(losses[-1])
    assert seen[0] == seen[1]


def test_two_processes_stay_identical(scenes: Path, tmp_path: Path) -> None:
    """The train tool itself, under torchrun with gloo."""
    cfg = small_config(scenes, tmp_path / 'work', iters=1)
    cfg.custom_imports.imports = ['pm_seg', 'compare_processes']
    cfg.custom_hooks.append(dict(type='CompareProcesses'))
    (tmp_path / 'compare_processes.py').write_text(COMPARE)
    cfg.load_from = dense_checkpoint(cfg, tmp_path)
    cfg.dump(tmp_path / 'config.py')
    start = read_checkpoint(cfg.load_from)['state_dict']
    result = run_tool(
        '-m', 'torch.distributed.run', '--nproc_per_node=2',
        '--standalone', ROOT / 'tools/train.py',
        tmp_path / 'config.py', '--launcher', 'pytorch',
        cwd=tmp_path, env=dict(PYTHONPATH=str(tmp_path), OMP_NUM_THREADS='1'),
    )  # fmt: skip
    assert 'IDENTICAL' in result.stdout + result.stderr
    state = read_checkpoint(tmp_path / 'work/iter_1.pth')
    # 2 processes x 2 batches of 2 images: the same 8 images in one process
    for batch_size in (1, 4, 8):
        cfg = small_config(scenes, tmp_path)
        cfg.train_dataloader.batch_size = batch_size
        init_default_scope('mmseg')
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        model.load_state_dict(start)
        compress(model, cfg.train_dataloader, 8 // batch_size)
        for name, module in compressible_modules(model).items():
            together = state['state_dict'][f'{name}.compressor.scores']
            difference = (module.compressor.scores - together).abs().max()
            assert difference <= 1e-6 * together.max()


def test_bad_score_iters() -> None:
    with pytest.raises(ValueError, match='score_iters=0'):
        PruneMergeHook(score_iters=0)


def test_sharded_parameters_cannot_be_scored(monkeypatch) -> None:
    """FSDP: says to compress first, instead of failing in a convolution."""
    from types import SimpleNamespace

    from pm_seg.engine.hooks import prune_merge_hook

    wrapper = torch.nn.DataParallel
    monkeypatch.setattr(prune_merge_hook, 'FullyShardedDataParallel', wrapper)
    runner = SimpleNamespace(model=wrapper(tiny.build()))
    with pytest.raises(RuntimeError, match=r'tools/compress\.py'):
        PruneMergeHook().before_train(runner)
