"""What training and testing add to a run of mmengine."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from ..core.presets import nearest
from ..utils.quiet import is_for_people
from .config import load_config


def load_run_config(args: argparse.Namespace) -> Config:
    """:func:`load_config`, with the launcher and the work directory.

    That is, in this order, ``--work-dir``, the config's ``work_dir``, or
    ``work_dirs/CONFIG_NAME``.
    """
    os.environ.setdefault('LOCAL_RANK', args.local_rank)
    cfg = load_config(args)
    cfg.launcher = args.launcher
    default = cfg.get('work_dir') or f'work_dirs/{Path(args.config).stem}'
    cfg.work_dir = args.work_dir or default
    return cfg


def build_runner(cfg: Config) -> Runner | FlexibleRunner:
    """The runner of a config, with a console for people.

    The environment, the config and the order of the hooks go to the log file
    alone, see :data:`pm_seg.utils.quiet.LOG_NOISE`.
    """
    if cfg.launcher in ('pytorch', 'slurm') and get_device() == 'cpu':
        _join_cpu_processes(cfg)
    kind = cfg.get('runner_type', 'Runner')
    base = RUNNERS.get(kind)
    if base is None:
        known = nearest(kind, RUNNERS.module_dict)
        raise ValueError(f'runner_type={kind!r} is in no registry; {known}')

    class ToolRunner(base):
        def _log_env(self, *args) -> None:
            for handler in self.logger.handlers:
                if not isinstance(handler, logging.FileHandler):
                    handler.addFilter(is_for_people)
            file = f'{self.log_dir}/{self.timestamp}.log'
            self.logger.info(f'Config, environment and log: {file}')
            super()._log_env(*args)

    return ToolRunner.from_cfg(cfg)


def _join_cpu_processes(cfg: Config) -> None:
    """Join them by gloo, as mmengine's launchers would ask for CUDA."""
    if cfg.launcher == 'slurm':
        _read_slurm()
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


def _read_slurm() -> None:
    """Tell torch what Slurm told the process; the first node is the master.

    ``MASTER_ADDR`` and ``MASTER_PORT`` are kept where they are set.
    """
    for name, told in (
        ('RANK', 'SLURM_PROCID'),
        ('WORLD_SIZE', 'SLURM_NTASKS'),
        ('LOCAL_RANK', 'SLURM_LOCALID'),
    ):
        os.environ[name] = os.environ[told]
    os.environ.setdefault('MASTER_PORT', '29500')
    if 'MASTER_ADDR' not in os.environ:
        nodes = os.environ['SLURM_JOB_NODELIST']
        command = ['scontrol', 'show', 'hostnames', nodes]
        names = subprocess.check_output(command, text=True)
        os.environ['MASTER_ADDR'] = names.split()[0]


def end_processes() -> None:
    """End a process of a finished distributed run, when all are done.

    Nothing is taken down: threads of gloo now and then abort a process that
    leaves its group or ends, and the launcher then calls the run failed.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_first_process() -> bool:
    """Whether this is the first process of a distributed run, or alone."""
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return not any(int(os.environ.get(name, 0)) for name in names)


def guard_run(cfg: Config, *hooks: str) -> None:
    """Add hooks that are not there; save checkpoints whole; pin batches in
    memory that copies fast to a GPU, where there is one."""
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
