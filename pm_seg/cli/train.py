r"""Train a model.

With a PM config this is the whole job: compress the dense checkpoint
(load_from), measuring on a few training images, fine-tune it and evaluate it.
A checkpoint that is compressed already is fine-tuned as it is.

examples:
  # compress and fine-tune on one GPU, in mixed precision
  python tools/train.py configs/segmenter_vit-s_pm_ade20k.py --amp
  # from your own dense checkpoint, to a third of the operations
  python tools/train.py configs/segmenter_vit-t_pm_camvid.py \
      --cfg-options load_from=dense.pth model.backbone.compression.keep=0.33
  # go on after an interruption
  python tools/train.py configs/segmenter_vit-s_pm_ade20k.py --amp --resume
"""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import nullcontext

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import get_world_size

from ..engine import InterruptHook, RunGuardHook
from ..engine.faults import RunStoppedError, explain
from ..utils.checkpoints import latest_intact_checkpoint
from ..utils.lock import WorkDirInUseError, work_dir_lock
from .arguments import add_config, add_run, make_parser, output_folder
from .checkpoint import check_checkpoints, fix_teacher, prepare_resume
from .data import check_data
from .ending import command, wrong_usage
from .runs import (
    build_runner,
    end_processes,
    guard_run,
    is_first_process,
    load_run_config,
    use_amp,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('train.py', __doc__)
    add_config(parser)
    add = parser.add_argument
    add(
        '--resume',
        action='store_true',
        help='go on from the latest whole checkpoint in the work directory',
    )
    add(
        '--amp',
        action='store_true',
        help='automatic mixed precision, in bfloat16 where the device has '
        'it; needs a GPU',
    )
    add(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate to the total batch size',
    )
    add_run(parser)
    return parser.parse_args(argv)


@command('The same command with --resume goes on.')
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/train.py``."""
    args = parse_args(argv)
    cfg = load_run_config(args)
    if args.amp:
        if get_device() == 'cpu':
            wrong_usage('--amp needs a GPU; leave it out on a CPU')
        use_amp(cfg)
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            wrong_usage(
                '--auto-scale-lr needs the batch size the learning rate is '
                'for: auto_scale_lr=dict(base_batch_size=N) in the config'
            )
        cfg.auto_scale_lr.enable = True
    hooks = ['RunGuardHook', 'InterruptHook']
    if (cfg.model.get('backbone') or {}).get('compression') is not None:
        hooks.insert(0, 'PruneMergeHook')
    guard_run(cfg, *hooks)
    check_data(cfg, 'train', 'val')
    output_folder(cfg.work_dir)
    fix_teacher(cfg)
    resume = args.resume or cfg.get('resume')
    if not resume:
        check_checkpoints(cfg)
    lock = work_dir_lock(cfg.work_dir) if is_first_process() else nullcontext()
    try:
        with lock:
            if resume:
                prepare_resume(cfg)
            _run(cfg)
    except WorkDirInUseError as error:
        raise SystemExit(str(error)) from None
    except RunStoppedError as stop:
        print(stop, file=sys.stderr)
        if is_first_process() and latest_intact_checkpoint(cfg.work_dir):
            print(f'Go on with{_again(args, argv)}', file=sys.stderr)
        raise SystemExit(stop.code) from None
    end_processes()


def _again(args: argparse.Namespace, argv: list[str] | None) -> str:
    """The command that goes on with a stopped run."""
    if args.launcher != 'none':  # it starts the tool, with a command unknown
        return ' the same command and --resume'
    words = sys.argv[1:] if argv is None else argv
    if '--resume' not in words:
        words = [*words, '--resume']
    return f': python tools/train.py {shlex.join(words)}'


def _run(cfg: Config) -> None:
    """Train; every way to stop early ends in ``RunStoppedError`` or an error.

    Raises:
        RunStoppedError: With the checkpoint to go on from.
    """
    runner = None
    try:
        runner = build_runner(cfg)
        runner.train()
    except (Exception, KeyboardInterrupt) as error:
        # Last ones first: a wish to stop comes before what else is wrong.
        for hook in reversed(runner.hooks if runner else []):
            if isinstance(hook, InterruptHook):
                # Told to stop while it waited for images that never came.
                if hook.between_iterations and get_world_size() == 1:
                    hook.stop(runner)
                hook.release()
            elif isinstance(hook, RunGuardHook):
                hook.blame(runner)
        stop = explain(error, cfg.work_dir)
        if stop is None:
            raise
        raise stop from None
