"""Train a model."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import ExitStack

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size

from ..engine import InterruptHook, RunGuardHook
from ..engine.faults import RunStoppedError, explain
from ..utils.checkpoints import latest_intact_checkpoint
from ..utils.lock import WorkDirInUseError, work_dir_lock
from .common import (
    add_common_arguments,
    check_checkpoints,
    check_data,
    check_output,
    command,
    fix_teacher,
    load_config,
    make_parser,
    prepare_resume,
    quiet_warnings,
    wrong_usage,
)
from .runs import (
    build_runner,
    ensure_compression_hook,
    guard_run,
    is_first_process,
    join_cpu_processes,
    leave_processes,
    use_amp,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'train.py',
        'Train a model. With a PM config this is the whole job: compress the '
        'dense checkpoint (load_from), measuring on a few training images, '
        'fine-tune it and evaluate it. A checkpoint that is compressed '
        'already is fine-tuned as it is.',
        (
            'compress and fine-tune on one GPU, in mixed precision',
            'configs/segmenter_vit-s_pm_ade20k.py --amp',
        ),
        (
            'from your own dense checkpoint, to a third of the operations',
            'configs/segmenter_vit-t_pm_camvid.py --cfg-options '
            'load_from=dense.pth model.backbone.compression.keep=0.33',
        ),
        (
            'go on after an interruption',
            'configs/segmenter_vit-s_pm_ade20k.py --amp --resume',
        ),
    )
    parser.add_argument('config', help='config file, or the name of one')
    group = parser.add_argument_group('training')
    group.add_argument(
        '--resume',
        action='store_true',
        help='go on from the latest whole checkpoint in the work directory',
    )
    group.add_argument(
        '--amp',
        action='store_true',
        help='automatic mixed precision, in bfloat16 where the device has '
        'it; needs a GPU',
    )
    group.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate to the total batch size',
    )
    add_common_arguments(parser, runs=True)
    return parser.parse_args(argv)


@command('The same command with --resume goes on.')
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/train.py``."""
    args = parse_args(argv)
    quiet_warnings()
    cfg = load_config(args)
    if args.amp:
        if get_device() == 'cpu':
            wrong_usage(
                '--amp needs a GPU or another accelerator; leave it out on a '
                'CPU'
            )
        use_amp(cfg)
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            wrong_usage(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size='
                'N) in the config: the batch size its learning rate is for'
            )
        cfg.auto_scale_lr.enable = True
    ensure_compression_hook(cfg)
    check_data(cfg, 'train', 'val')
    check_output(cfg.work_dir, folder=True)
    fix_teacher(cfg)
    resume = args.resume or cfg.get('resume')
    if not resume:
        check_checkpoints(cfg)
    guard_run(cfg)
    try:
        with ExitStack() as stack:
            if is_first_process():
                stack.enter_context(work_dir_lock(cfg.work_dir))
            if resume:
                prepare_resume(cfg)
                check_checkpoints(cfg)
            join_cpu_processes(cfg)
            _run(cfg)
    except WorkDirInUseError as error:
        raise SystemExit(str(error)) from None
    except RunStoppedError as stop:
        print(f'{stop}', file=sys.stderr)
        if latest_intact_checkpoint(cfg.work_dir):
            command = _resume_command(sys.argv[1:] if argv is None else argv)
            print(f'Go on with: {command}', file=sys.stderr)
        raise SystemExit(stop.code) from None


def _run(cfg: Config) -> None:
    """Train; every way to stop early ends in ``RunStoppedError`` or an error.

    Raises:
        RunStoppedError: With the checkpoint to go on from.
    """
    runner = None
    try:
        runner = build_runner(cfg)
        runner.train()
        leave_processes()
    except (Exception, KeyboardInterrupt) as error:
        for hook in runner.hooks if runner else ():
            if isinstance(hook, InterruptHook):
                # Told to stop while it waited for images that never came.
                if hook.between_iterations and get_world_size() == 1:
                    hook.stop(runner)
                hook.release()
        for hook in runner.hooks if runner else ():
            if isinstance(hook, RunGuardHook):
                hook.blame(runner)
        stop = explain(error, cfg.work_dir)
        if stop is None:
            raise
        raise stop from None


def _resume_command(argv: list[str]) -> str:
    flags = [] if '--resume' in argv else ['--resume']
    place = argv.index('--cfg-options') if '--cfg-options' in argv else None
    words = argv[:place] + flags + (argv[place:] if place else [])
    return f'python tools/train.py {shlex.join(words)}'


if __name__ == '__main__':
    main()
