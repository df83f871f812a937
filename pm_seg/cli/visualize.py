"""Draw what a compressed model does with images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from rich.console import Console
from rich.table import Table

from ..models.distillation import strip_compression
from ..utils import ProgressReporter
from ..visualization.figures import save_figure
from ..visualization.inspection import (
    Inspection,
    dataset_meta,
    inspect,
    require_structure,
    test_pipeline,
)
from ..visualization.layers import structure_figures
from .common import (
    add_common_arguments,
    command,
    fetch_checkpoint,
    load_config,
    make_parser,
    quiet_warnings,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'visualize.py',
        'Draw what a compressed model does with images: OUT_DIR/tokens.png, '
        'the tokens each layer works on; scores.png, the scores its groups '
        'come from, if they do; and for each image NAME_groups.png, the token '
        'groups of every layer, each in its mean colour, pruned tokens dark; '
        'and NAME_prediction.png, the prediction of the dense and of the '
        'compressed model and where they differ, or for a classifier the '
        'likeliest classes. Slide inference: groups are those of the crop in '
        'the middle.',
        (
            'one image',
            'configs/segmenter_vit-t_pm_camvid.py pm.pth '
            'data/camvid/images/val/0016E5_07959.jpg --out-dir pictures',
        ),
    )
    parser.add_argument('config', help='a config with compression')
    parser.add_argument('checkpoint', help='compressed, or dense')
    parser.add_argument(
        'images', nargs='+', metavar='IMG', help='image file, or a folder'
    )
    parser.add_argument('--out-dir', required=True, help='folder to draw to')
    parser.add_argument(
        '--dense-checkpoint',
        metavar='CKPT',
        help='dense model to compare with; defaults to the weights of the '
        'checkpoint with compression off',
    )
    parser.add_argument(
        '--device',
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='defaults to cuda if there is one',
    )
    add_common_arguments(parser)
    return parser.parse_args(argv)


_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.tif', '.tiff', '.webp')


def _image_files(arguments: list[str]) -> list[Path]:
    """Files, and the images in folders.

    Raises:
        SystemExit: If there is no such file, or no image in a folder.
    """
    files = []
    for path in map(Path, arguments):
        if path.is_dir():
            inside = sorted(
                p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES
            )
            if not inside:
                raise SystemExit(f'No images in the folder {path}')
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise SystemExit(f'Image not found: {path}')
    return files


def _load(
    cfg: Config, checkpoint: str, device: str, dense: bool = False
) -> tuple[BaseModel, dict]:
    """Build a model, load its weights; also returns the checkpoint."""
    model_cfg = cfg.model
    if dense:
        model_cfg = ConfigDict(strip_compression(model_cfg.to_dict()))
    model = MODELS.build(model_cfg)
    saved = load_checkpoint(
        model, fetch_checkpoint(checkpoint), map_location='cpu'
    )
    return model.to(device).eval(), saved


def _unique(name: str, taken: set[str]) -> str:
    """A name for pictures of images that have the same file name."""
    number, result = 2, name
    while result in taken:
        result, number = f'{name}_{number}', number + 1
    taken.add(result)
    return result


def _ranking_table(inspection: Inspection, meta: dict) -> Table:
    table = Table()
    for column in ('class', 'dense', 'compressed'):
        table.add_column(
            column, justify='left' if column == 'class' else 'right'
        )
    for label, dense, compressed in inspection.ranking(meta):
        table.add_row(label, f'{dense:.1%}'[:-1], f'{compressed:.1%}'[:-1])
    return table


@command()
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/visualize.py``."""
    args = parse_args(argv)
    quiet_warnings()
    files = _image_files(args.images)
    cfg = load_config(args)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    try:
        model, saved = _load(cfg, args.checkpoint, args.device)
        require_structure(model)
        pipeline = test_pipeline(cfg)
        dense_model = None
        if args.dense_checkpoint:
            dense_model, _ = _load(
                cfg, args.dense_checkpoint, args.device, dense=True
            )
    except (RuntimeError, ValueError) as error:
        sys.exit(f'{args.checkpoint}: {error}')
    meta = dataset_meta(cfg, saved)
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in structure_figures(model).items():
        save_figure(figure, folder / f'{name}.png')
    console = Console(highlight=False)
    taken: set[str] = set()
    lines: list[str | Table] = []
    with ProgressReporter('Drawing', len(files)) as report:
        for done, path in enumerate(files, 1):
            sample = pipeline(dict(img_path=str(path)))
            inspection = inspect(model, sample, dense_model)
            name = _unique(inspection.name, taken)
            for kind, figure in inspection.figures(meta).items():
                save_figure(figure, folder / f'{name}_{kind}.png')
            if inspection.classifies:
                lines += [
                    f'{name}: probability, %',
                    _ranking_table(inspection, meta),
                ]
            else:
                changed = (inspection.dense != inspection.compressed).mean()
                lines.append(f'{name}: {changed:.1%} of the pixels differ')
            report(done)
    for line in lines:
        console.print(line)
    console.print(f'Pictures: {folder}')


if __name__ == '__main__':
    main()
