"""What training and testing add to a run of mmengine."""

from __future__ import annotations

import logging
import os

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from ..utils.quiet import is_for_people


def _for_people(runner: Runner | FlexibleRunner, logger: MMLogger) -> None:
    """Say where the log file is, and leave what it alone needs to it."""
    for handler in logger.handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.addFilter(is_for_people)
    file = f'{runner.log_dir}/{runner.timestamp}.log'
    logger.info(f'Config, environment and log: {file}')


class ToolRunner(Runner):
    """mmengine's runner, with a console for people.

    The environment, the config and the order of the hooks go to the log file
    alone, see :data:`pm_seg.utils.quiet.LOG_NOISE`.
    """

    def build_logger(self, *args, **kwargs) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        _for_people(self, logger)
        return logger


class FlexibleToolRunner(FlexibleRunner):
    """The same of mmengine's runner for FSDP and other strategies."""

    def _log_env(self) -> None:
        _for_people(self, self.logger)
        super()._log_env()


def build_runner(cfg: Config) -> Runner | FlexibleRunner:
    """The runner of a config, its ``runner_type`` or mmengine's usual one."""
    kind = cfg.get('runner_type', 'Runner')
    tools = dict(Runner=ToolRunner, FlexibleRunner=FlexibleToolRunner)
    return tools[kind].from_cfg(cfg) if kind in tools else RUNNERS.build(cfg)


def join_cpu_processes(cfg: Config) -> None:
    """Let ``--launcher pytorch`` work on machines without an accelerator.

    mmengine's launcher asks for CUDA; here the processes are joined by gloo
    before, which it accepts. Does nothing where there is an accelerator.
    """
    if cfg.launcher != 'pytorch' or get_device() != 'cpu':
        return
    torch.distributed.init_process_group('gloo')
    wrapper = (cfg.get('strategy') or {}).get('model_wrapper')
    if wrapper:  # FSDP would move to a GPU
        wrapper.device_id = torch.device('cpu')
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )


def leave_processes() -> None:
    """Leave the group of processes, if there is one.

    Threads of a group that is left to the end of the interpreter now and
    then abort it, and the launcher then calls a finished run failed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_first_process() -> bool:
    """Whether this is the first process of a distributed run, or alone."""
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return not any(int(os.environ.get(name, 0)) for name in names)


#: What watches over a run of the tools.
_TRAIN_GUARDS = ('RunGuardHook', 'InterruptHook')


def guard_run(cfg: Config, hooks: tuple[str, ...] = _TRAIN_GUARDS) -> None:
    """Add hooks that stop and save cleanly; save checkpoints whole.

    Batches come in memory that copies fast to a GPU, where there is one.
    """
    given = list(cfg.get('custom_hooks') or [])
    present = {hook.get('type') for hook in given}
    given += [dict(type=hook) for hook in hooks if hook not in present]
    cfg.custom_hooks = given
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if torch.cuda.is_available() and cfg.get(name):
            cfg[name].setdefault('pin_memory', True)
    saving = (cfg.get('default_hooks') or {}).get('checkpoint')
    if saving and saving.get('type') == 'CheckpointHook':
        saving.type = 'WholeCheckpointHook'


def use_amp(cfg: Config) -> None:
    """Train in mixed precision, in what the config says or the device has.

    bfloat16 needs no scaled loss; float16 overflows without.
    """
    wrapper = cfg.optim_wrapper
    wrapper.type = 'AmpOptimWrapper'
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.get_device_capability() >= (8, 0):
        wrapper.setdefault('dtype', 'bfloat16')
    scaled = wrapper.get('dtype') != 'bfloat16'
    wrapper.setdefault('loss_scale', 'dynamic' if scaled else 1.0)


def ensure_compression_hook(cfg: Config) -> None:
    """Add ``PruneMergeHook`` to a config that compresses without it."""
    hooks = list(cfg.get('custom_hooks') or [])
    if _compresses(cfg.model) and not any(
        hook['type'] == 'PruneMergeHook' for hook in hooks
    ):
        cfg.custom_hooks = [*hooks, dict(type='PruneMergeHook')]


def _compresses(node: object) -> bool:
    return isinstance(node, dict) and (
        node.get('compression') is not None
        or any(map(_compresses, node.values()))
    )
