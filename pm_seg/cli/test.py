"""Test a model."""

from __future__ import annotations

import argparse

from mmengine.config import Config

from .common import (
    add_common_arguments,
    check_data,
    check_output,
    command,
    fetch_checkpoint,
    load_config,
    make_parser,
    quiet_warnings,
    wrong_usage,
)
from .runs import (
    ToolRunner,
    guard_run,
    join_cpu_processes,
    leave_processes,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'test.py',
        'Evaluate a checkpoint: mIoU for segmentation, top-1 for '
        'classification. A compressed checkpoint needs the config it was '
        'compressed with. A dense one runs compressed in a _pm_ config, and '
        'dense in the config without; only pm-paper configs need a '
        'compressed one.',
        (
            'mIoU, and the predictions drawn over the images',
            'configs/segmenter_vit-s_pm_ade20k.py pm.pth --show-dir pictures',
        ),
        (
            'save the label maps',
            'configs/segmenter_vit-s_pm_ade20k.py pm.pth --out predicted',
        ),
    )
    parser.add_argument('config', help='config file, or the name of one')
    parser.add_argument('checkpoint', help='checkpoint file or address')
    group = parser.add_argument_group('evaluation')
    group.add_argument(
        '--tta',
        action='store_true',
        help='average over sizes and flips (test-time augmentation)',
    )
    group = parser.add_argument_group('predictions')
    group.add_argument(
        '--out',
        help='folder to save predictions to; a .pkl file for classification',
    )
    group.add_argument(
        '--show-dir', metavar='DIR', help='folder to draw predictions to'
    )
    group.add_argument(
        '--show', action='store_true', help='show predictions on screen'
    )
    group.add_argument(
        '--wait-time',
        type=float,
        default=2,
        metavar='SECONDS',
        help='how long --show shows each (default 2)',
    )
    add_common_arguments(parser, runs=True)
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
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if hook.type == 'VisualizationHook':
        hook.enable = True
        hook.interval = 1
        hook.out_dir = args.show_dir
        return
    hook.draw = True
    hook.interval = 1  # the original packages draw every 50th image
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def _save_predictions(cfg: Config, out: str) -> None:
    """Label maps into a folder, or classifications into a file."""
    if cfg.get('default_scope') != 'mmpretrain':
        cfg.test_evaluator.output_dir = out
        cfg.test_evaluator.keep_results = True
        return
    if not out.endswith(('.pkl', '.pickle')):
        wrong_usage(
            f'--out {out}: classifications are saved to a file; give it a '
            'name that ends in .pkl'
        )
    metrics = cfg.test_evaluator
    metrics = metrics if isinstance(metrics, list) else [metrics]
    dump = dict(type='DumpResults', out_file_path=out)
    cfg.test_evaluator = [*metrics, dump]


@command()
def main(argv: list[str] | None = None) -> dict[str, float]:
    """Entry point of ``tools/test.py``; returns the metrics."""
    args = parse_args(argv)
    quiet_warnings()
    cfg = load_config(args)
    cfg.load_from = fetch_checkpoint(args.checkpoint)
    cfg.resume = False
    check_data(cfg, 'test')
    single = cfg.get('default_scope') == 'mmpretrain'
    for path, folder in ((args.out, not single), (args.show_dir, True)):
        if path:
            check_output(path, folder)
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
    guard_run(cfg, ('RunGuardHook',))
    join_cpu_processes(cfg)
    metrics = ToolRunner.from_cfg(cfg).test()
    leave_processes()
    return metrics


if __name__ == '__main__':
    main()
