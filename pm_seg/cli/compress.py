"""Score and compress a dense checkpoint, without training."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint

from ..core.structure import check_rates
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
    check_output,
    fetch_checkpoint,
    load_config,
    quiet_warnings,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='compress.py',
        description='Gather scores on training images, find the structure of '
        'each layer and write a compressed checkpoint, ready for test.py or '
        'for fine-tuning. A checkpoint that has scores already is not '
        'scored again.',
        epilog='Example: python tools/compress.py '
        'configs/segmenter_vit-t_pm_camvid.py dense.pth --out pm.pth '
        '--keep 0.7',
    )
    parser.add_argument('config', help='a config with compression')
    parser.add_argument('checkpoint', help='dense or compressed checkpoint')
    parser.add_argument('--out', required=True, help='checkpoint to write')
    parser.add_argument(
        '--keep', type=float, help='share of the tokens to keep, in (0, 1]'
    )
    parser.add_argument(
        '--target',
        metavar='KIND=VALUE',
        help='a budget instead of keep, with KIND one of '
        f'{", ".join(TARGETS)}: share=0.7 is 70 %% of the dense GMACs',
    )
    parser.add_argument(
        '--score-iters',
        type=int,
        help="training batches to score; defaults to the config's hook",
    )
    parser.add_argument(
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
        raise SystemExit(f'--target {text}: {error}') from None


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/compress.py``."""
    args = parse_args(argv)
    quiet_warnings()
    cfg = load_config(args)
    target = _target(args.target)
    check_output(args.out)
    checkpoint = fetch_checkpoint(args.checkpoint)
    if args.keep is not None:
        try:
            check_rates(args.keep, 0.0)
        except ValueError as error:
            raise SystemExit(f'--keep: {error}') from None
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
    try:
        with whole_files(Path(args.out)) as (partial,):
            torch.save(content, partial)
    except (OSError, RuntimeError) as error:  # of the system, of torch
        raise SystemExit(
            f'Cannot write {args.out} to its end ({error}); what was there is '
            'unchanged. '
            'Make room or choose another place with --out'
        ) from None
    print(f'Wrote {args.out}')


if __name__ == '__main__':
    main()
