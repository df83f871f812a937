"""Training through the runner: calibration, several processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch
from helpers import (
    ROOT,
    dense_checkpoint,
    free_port,
    run_tool,
    small_config,
)
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import MODELS

from pm_seg.engine import Measuring, PruneMergeHook, compress
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
        assert state['backbone.compressor.comparison.importance'].any()
        for key, value in state.items():
            copies = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(copies, value.contiguous())
            assert torch.equal(*copies), key
        runner.logger.info(f'IDENTICAL {len(state)}')
"""


def train(cfg) -> Runner:
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def test_calibrates_compresses_and_trains(
    scenes: Path, tmp_path: Path
) -> None:
    """What was found and learned is in the checkpoint."""
    runner = train(small_config(scenes, tmp_path, iters=3))
    model = runner.model
    compressor = model.backbone.compressor
    assert compressor.compressed and compressor.calibrated
    state = read_checkpoint(tmp_path / 'iter_3.pth')['state_dict']
    assert state['backbone.compressor.comparison.importance'].any()
    assert state['backbone.compressor.settled']
    gain = state['backbone.compressor.gain']
    assert (gain != 1).any() and torch.equal(gain, compressor.gain)
    decay = {
        id(p): group['weight_decay']
        for group in runner.optim_wrapper.param_groups
        for p in group['params']
    }
    assert decay[id(compressor.gain)] == 0
    assert decay[id(model.backbone.pos_embed)] > 0


def test_nothing_to_measure_on(scenes: Path, tmp_path: Path) -> None:
    """No batch is loaded before training, and all the same it compresses."""
    cfg = small_config(scenes, tmp_path, iters=1)
    cfg.custom_hooks[0].calib_batches = 0
    batches = count_batches(cfg)
    compressor = batches.pop(0).backbone.compressor
    assert len(batches) == 1
    assert compressor.compressed and not compressor.calibrated


def count_batches(cfg) -> list:
    """The trained model, and the sum of each batch of training images."""
    runner = Runner.from_cfg(cfg)
    sums = []
    step = runner.model.data_preprocessor.forward

    def watch(data, training=False):
        if training:
            inputs = torch.stack(data['inputs'])
            sums.append(inputs.double().sum().item())
        return step(data, training)

    runner.model.data_preprocessor.forward = watch
    runner.train()
    return [runner.model, *sums]


def test_keeps_what_a_compressed_checkpoint_has(
    scenes: Path, tmp_path: Path
) -> None:
    """Its schedule, not that of the config; nothing is measured again."""
    first = train(small_config(scenes, tmp_path / 'first')).model
    cfg = small_config(scenes, tmp_path / 'second', iters=1)
    cfg.load_from = str(tmp_path / 'first' / 'iter_2.pth')
    cfg.model.backbone.compression.keep = 0.9
    model, *sums = count_batches(cfg)
    assert len(sums) == 1
    found, expected = (m.backbone.compressor for m in (model, first))
    assert found.loads() == expected.loads()
    found, expected = found.comparison, expected.comparison
    assert torch.equal(found.importance, expected.importance)
    assert found.strength == expected.strength


def test_calibration_does_not_shift_training(scenes, tmp_path) -> None:
    """The batches seen in training do not depend on how many came before."""
    seen = []
    for count in (1, 3):
        cfg = small_config(scenes, tmp_path / str(count), iters=1)
        cfg.custom_hooks[0].calib_batches = count
        _, *sums = count_batches(cfg)
        assert len(sums) == 2 * count + 1  # importance, then ways to merge
        assert sums[:count] == sums[count:-1]
        seen.append(sums[-1])
    assert seen[0] == seen[1]


def test_two_processes_stay_identical(scenes: Path, tmp_path: Path) -> None:
    """The train tool itself, as torchrun starts it, with gloo."""
    cfg = small_config(scenes, tmp_path / 'work', iters=1)
    cfg.custom_imports.imports = ['pm_seg', 'compare_processes']
    cfg.custom_hooks += [
        dict(type='CompareProcesses'),
        dict(type='ProgressHook', title='Together'),
    ]
    (tmp_path / 'compare_processes.py').write_text(COMPARE)
    cfg.load_from = dense_checkpoint(cfg, tmp_path)
    cfg.dump(tmp_path / 'config.py')
    dense = read_checkpoint(cfg.load_from)['state_dict']
    told = dict(
        PYTHONPATH=str(tmp_path),
        OMP_NUM_THREADS='1',
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(free_port()),
    )

    def start(rank: str) -> str:
        result = run_tool(
            ROOT / 'tools/train.py', 'config.py', '--launcher', 'pytorch',
            cwd=tmp_path, env=dict(told, RANK=rank, LOCAL_RANK=rank),
        )  # fmt: skip
        return result.stdout + result.stderr

    with ThreadPoolExecutor(2) as pool:
        printed = ''.join(pool.map(start, '01'))
    assert 'IDENTICAL' in printed
    assert printed.count('Together: 1/1') == 1  # said by one of them
    state = read_checkpoint(tmp_path / 'work/iter_1.pth')['state_dict']
    # 2 processes x 2 batches of 2 images: the same 8 images in one process
    for batch_size in (1, 8):
        cfg = small_config(scenes, tmp_path)
        cfg.train_dataloader.batch_size = batch_size
        init_default_scope('mmseg')
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        model.load_state_dict(dense)
        measuring = Measuring(calib_batches=8 // batch_size)
        compress(model, cfg.train_dataloader, measuring=measuring)
        compressor = model.backbone.compressor
        together = state['backbone.compressor.comparison.importance']
        found = compressor.comparison.importance
        assert (found - together).abs().max() <= 1e-3 * together.abs().max()
        for name in ('shares', 'comparison.strength'):
            value = state[f'backbone.compressor.{name}']
            assert torch.equal(compressor.get_buffer(name), value), name


def test_numbers_are_checked() -> None:
    with pytest.raises(ValueError, match='score_batches=0 must be at least'):
        PruneMergeHook(score_batches=0)
    with pytest.raises(ValueError, match="target={'flops': 1} must have"):
        PruneMergeHook(target=dict(flops=1))


def test_sharded_parameters_cannot_be_scored(monkeypatch) -> None:
    """FSDP: says to compress first, instead of failing in a convolution."""
    from types import SimpleNamespace

    from pm_seg.engine.hooks import prune_merge_hook

    wrapper = torch.nn.DataParallel
    monkeypatch.setattr(prune_merge_hook, 'FullyShardedDataParallel', wrapper)
    runner = SimpleNamespace(model=wrapper(tiny.build()))
    with pytest.raises(RuntimeError, match=r'tools/compress\.py'):
        PruneMergeHook().before_train(runner)
