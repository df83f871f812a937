"""Score and compress a dense checkpoint, without training."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from ..engine.compression import calibration_loader, compress, needs_data
from ..engine.report import describe
from ..engine.scoring import require_compressible
from ..engine.targets import TARGETS, check_target
from ..utils import ProgressReporter
from ..utils.files import whole_files
from ..version import __version__
from .common import (
    add_common_arguments,
    check_data,
    command,
    fetch_checkpoint,
    load_config,
    make_parser,
    quiet_warnings,
    wrong_usage,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'compress.py',
        'Gather scores on training images, find the structure of each layer '
        'and write a compressed checkpoint, ready for test.py or for '
        'fine-tuning. Nothing is trained. A checkpoint that has scores '
        'already is not scored again, so trying another --keep takes '
        'seconds.',
        (
            'keep 70 % of the tokens',
            'configs/segmenter_vit-t_pm_camvid.py dense.pth --out pm.pth '
            '--keep 0.7',
        ),
        (
            'half of the cost of the dense model',
            'configs/segmenter_vit-t_pm_camvid.py dense.pth --out pm.pth '
            '--target share=0.5',
        ),
    )
    parser.add_argument('config', help='a config with compression')
    parser.add_argument('checkpoint', help='dense or compressed checkpoint')
    parser.add_argument('--out', required=True, help='checkpoint to write')
    group = parser.add_argument_group('how much to keep')
    group.add_argument(
        '--keep', type=float, help='share of the tokens to keep, in (0, 1]'
    )
    group.add_argument(
        '--target',
        metavar='KIND=VALUE',
        help='a budget instead of keep, with KIND one of '
        f'{", ".join(TARGETS)}: share=0.7 is 70 %% of the dense GMACs',
    )
    group = parser.add_argument_group('measuring')
    group.add_argument(
        '--score-iters',
        type=int,
        metavar='N',
        help="training batches to score; defaults to the config's hook",
    )
    group.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='defaults to cuda if there is one',
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


def _hook(cfg: Config) -> dict:
    for hook in cfg.get('custom_hooks') or []:
        if hook['type'] == 'PruneMergeHook':
            return hook
    return {}


def _set_keep(node: object, keep: float) -> None:
    """Set ``keep`` in every compression dict of a model config."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == 'compression' and value is not None:
            value['keep'] = keep
        else:
            _set_keep(value, keep)


def _target(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    kind, _, value = text.partition('=')
    try:
        return dict([check_target({kind: float(value)})])
    except ValueError as error:
        wrong_usage(f'--target {text}: {error}')


@command('No checkpoint was written.')
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/compress.py``."""
    args = parse_args(argv)
    quiet_warnings()
    cfg = load_config(args)
    target = _target(args.target)
    checkpoint = fetch_checkpoint(args.checkpoint)
    if args.keep is not None:
        _set_keep(cfg.model, args.keep)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    model = MODELS.build(cfg.model)
    require_compressible(model)
    saved = load_checkpoint(model, checkpoint, map_location='cpu')
    model.to(args.device)
    if needs_data(model):
        check_data(cfg, 'train')
    hook = _hook(cfg)
    with ExitStack() as stack:
        reports: dict[str, ProgressReporter] = {}

        def progress(title: str, done: int, total: int) -> None:
            if title not in reports:
                reporter = ProgressReporter(title, total)
                reports[title] = stack.enter_context(reporter)
            reports[title](done)
            if done == total:
                stack.close()

        keep = compress(
            model,
            calibration_loader(cfg),
            args.score_iters or hook.get('score_iters', 50),
            hook.get('reduction', 'image'),
            hook.get('seed', 0),
            target,
            hook.get('calib_iters', 2),
            progress,
        )
    if keep is not None:
        print(f'keep={keep:.3f} meets {args.target}')
    print(describe(model))
    meta = {
        **{k: saved.get('meta', {}).get(k) for k in ('dataset_meta',)},
        'cfg': cfg.pretty_text,
        'pm_seg_version': __version__,
    }
    content = {'state_dict': model.cpu().state_dict(), 'meta': meta}
    with whole_files(Path(args.out)) as (partial,):
        torch.save(content, partial)
    print(f'Wrote {args.out}')


if __name__ == '__main__':
    main()
