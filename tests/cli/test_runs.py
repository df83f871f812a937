"""What tools add to the config of a run."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
from mmengine.config import Config

from pm_seg.cli import runs
from pm_seg.cli.runs import guard_run, use_amp


@pytest.mark.parametrize(
    ('capability', 'given', 'expected'),
    [
        ((9, 0), {}, ('bfloat16', 1.0)),
        ((7, 5), {}, (None, 'dynamic')),
        (None, {}, (None, 'dynamic')),  # an accelerator that is no GPU
        ((9, 0), dict(dtype='float16'), ('float16', 'dynamic')),
        ((9, 0), dict(loss_scale=512.0), ('bfloat16', 512.0)),
    ],
)
def test_mixed_precision_is_bfloat16_where_there_is_some(
    monkeypatch, capability, given: dict, expected: tuple
) -> None:
    cuda = capability is not None
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(
        torch.cuda, 'get_device_capability', lambda: capability
    )
    cfg = Config(dict(optim_wrapper=dict(type='OptimWrapper', **given)))
    use_amp(cfg)
    wrapper = cfg.optim_wrapper
    assert wrapper.type == 'AmpOptimWrapper'
    assert (wrapper.get('dtype'), wrapper.loss_scale) == expected


@pytest.mark.parametrize('cuda', [False, True])
def test_batches_are_pinned_for_a_gpu(monkeypatch, cuda: bool) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    cfg = Config(
        dict(
            train_dataloader=dict(batch_size=1),
            val_dataloader=dict(pin_memory=False),
            test_dataloader=None,
        )
    )
    guard_run(cfg)
    assert cfg.train_dataloader.get('pin_memory', False) == cuda
    assert not cfg.val_dataloader.pin_memory


class JoinedError(Exception):
    pass


@pytest.mark.parametrize(
    ('given', 'master'),
    [({}, 'n3:29500'), (dict(MASTER_ADDR='a', MASTER_PORT='7'), 'a:7')],
)
def test_processes_of_slurm_join_without_a_gpu(
    monkeypatch, given: dict, master: str
) -> None:
    """As mmengine's launcher has them join, but by gloo."""
    told = dict(
        SLURM_PROCID='5',
        SLURM_NTASKS='8',
        SLURM_LOCALID='1',
        SLURM_JOB_NODELIST='n[3-4]',
    )
    monkeypatch.setattr(os, 'environ', {**told, **given})

    def scontrol(command: list[str], text: bool) -> str:
        assert command == ['scontrol', 'show', 'hostnames', 'n[3-4]']
        return 'n3\nn4\n'

    def join(backend: str) -> None:
        found = os.environ
        raise JoinedError(
            backend,
            f'{found["RANK"]} of {found["WORLD_SIZE"]}',
            found['LOCAL_RANK'],
            f'{found["MASTER_ADDR"]}:{found["MASTER_PORT"]}',
        )

    monkeypatch.setattr(subprocess, 'check_output', scontrol)
    monkeypatch.setattr(torch.distributed, 'init_process_group', join)
    monkeypatch.setattr(runs, 'get_device', lambda: 'cpu')
    with pytest.raises(JoinedError) as error:
        runs.build_runner(Config(dict(launcher='slurm')))
    assert error.value.args == ('gloo', '5 of 8', '1', master)
