"""Train a model."""

from __future__ import annotations

import argparse

from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .common import (
    add_common_arguments,
    check_checkpoints,
    check_data,
    ensure_compression_hook,
    fix_teacher,
    join_cpu_processes,
    load_config,
    prepare_resume,
    quiet_warnings,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='train.py',
        description='Train a model. With a PM config: gather scores on the '
        'dense checkpoint (load_from), compress, fine-tune, evaluate.',
        epilog='Example: python tools/train.py '
        'configs/segmenter_vit-s_pm_ade20k.py --amp',
    )
    parser.add_argument('config', help='config file, or the name of one')
    parser.add_argument(
        '--resume',
        action='store_true',
        help='go on from the latest checkpoint in the work directory',
    )
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate to the total batch size',
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/train.py``."""
    args = parse_args(argv)
    quiet_warnings()
    cfg = load_config(args)
    if args.amp:
        if get_device() == 'cpu':
            raise SystemExit(
                '--amp needs a GPU or another accelerator; leave it out on a '
                'CPU'
            )
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise SystemExit(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size='
                'N) in the config: the batch size its learning rate is for'
            )
        cfg.auto_scale_lr.enable = True
    ensure_compression_hook(cfg)
    check_data(cfg, 'train', 'val')
    fix_teacher(cfg)
    if args.resume or cfg.get('resume'):
        prepare_resume(cfg)
    check_checkpoints(cfg)
    join_cpu_processes(cfg)
    if 'runner_type' in cfg:  # FlexibleRunner, for FSDP
        RUNNERS.build(cfg).train()
    else:
        Runner.from_cfg(cfg).train()


if __name__ == '__main__':
    main()
