r"""Test a model.

mIoU for segmentation, top-1 for classification. A compressed checkpoint needs
the config it was compressed with. A dense one runs compressed in a _pm_
config, and dense in the config without; only pm-paper configs need a
compressed one.

examples:
  # mIoU, and the predictions drawn over the images
  python tools/test.py configs/segmenter_vit-s_pm_ade20k.py pm.pth \
      --show-dir pictures
  # save the label maps
  python tools/test.py configs/segmenter_vit-s_pm_ade20k.py pm.pth \
      --out predicted
"""

from __future__ import annotations

import argparse

from mmengine.config import Config

from .arguments import (
    add_config,
    add_run,
    make_parser,
    output_file,
    output_folder,
)
from .checkpoint import fetch_checkpoint
from .data import check_data
from .ending import command, wrong_usage
from .runs import build_runner, end_processes, guard_run, load_run_config


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('test.py', __doc__)
    add_config(parser)
    add = parser.add_argument
    add('checkpoint', help='checkpoint file or address')
    add('--tta', action='store_true', help='average over sizes and flips')
    add(
        '--out',
        help='folder to save predictions to; a .pkl file for classification',
    )
    add('--show-dir', type=output_folder, help='folder to draw predictions to')
    add('--show', action='store_true', help='show predictions on screen')
    add(
        '--wait-time',
        type=float,
        default=2,
        help='seconds of each (default 2)',
    )
    add_run(parser)
    return parser.parse_args(argv)


def _draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    hook = cfg.default_hooks.get('visualization')
    if hook is None:
        raise SystemExit(
            '--show and --show-dir need a visualization hook; add '
            'default_hooks=dict(visualization=dict(type='
            "'SegVisualizationHook')) to the config ('VisualizationHook' "
            'for classification)'
        )
    hook.interval = 1  # the original packages draw every 50th image
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    folder = args.show_dir and str(args.show_dir)
    if hook.type == 'VisualizationHook':
        hook.update(enable=True, out_dir=folder)
        return
    hook.draw = True
    if folder:
        cfg.visualizer.save_dir = folder


def _save_predictions(cfg: Config, out: str) -> None:
    """Label maps into a folder, or classifications into a file."""
    if cfg.get('default_scope') != 'mmpretrain':
        output_folder(out)
        cfg.test_evaluator.update(output_dir=out, keep_results=True)
        return
    if not out.endswith(('.pkl', '.pickle')):
        wrong_usage(
            f'--out {out}: classifications are saved to a file; give it a '
            'name that ends in .pkl'
        )
    output_file(out)
    metrics = cfg.test_evaluator
    metrics = metrics if isinstance(metrics, list) else [metrics]
    dump = dict(type='DumpResults', out_file_path=out)
    cfg.test_evaluator = [*metrics, dump]


@command()
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Entry point of ``tools/test.py``; returns the metrics."""
    args = parse_args(argv)
    cfg = load_run_config(args)
    cfg.load_from = fetch_checkpoint(args.checkpoint)
    cfg.resume = False
    check_data(cfg, 'test')
    if args.show or args.show_dir:
        _draw_predictions(cfg, args)
    if args.tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            raise SystemExit(
                '--tta needs tta_model and tta_pipeline in the config'
            )
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    if args.out is not None:
        _save_predictions(cfg, args.out)
    guard_run(cfg, 'RunGuardHook')
    cfg.runner_type = 'Runner'  # weights are whole, however it was trained
    metrics = build_runner(cfg).test()
    end_processes()
    return metrics
