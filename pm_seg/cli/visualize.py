r"""Draw what a compressed model does with images.

OUT_DIR/tokens.png shows the tokens each layer works on; scores.png the scores
its groups come from, if they do; and for each image NAME_groups.png the token
groups of every layer, each in its mean colour, pruned tokens dark; and
NAME_prediction.png the prediction of the dense and of the compressed model and
where they differ, or for a classifier the likeliest classes. Slide inference:
groups are those of the crop in the middle.

example:
  # one image
  python tools/visualize.py configs/segmenter_vit-t_pm_camvid.py pm.pth \
      data/camvid/images/val/0016E5_07959.jpg --out-dir pictures
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from mmengine.config import ConfigDict
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
from .arguments import add_config, add_device, make_parser, output_folder
from .config import load_config, load_model
from .ending import command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('visualize.py', __doc__)
    add_config(parser)
    add = parser.add_argument
    add('checkpoint', help='compressed, or dense')
    add('images', nargs='+', metavar='IMG', help='image file, or a folder')
    add('--out-dir', type=output_folder, required=True, help='where to draw')
    add(
        '--dense-checkpoint',
        metavar='CKPT',
        help='dense model to compare with; defaults to the weights of the '
        'checkpoint with compression off',
    )
    add_device(parser)
    return parser.parse_args(argv)


_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm', '.tif', '.tiff', '.webp')


def _image_files(arguments: list[str]) -> list[Path]:
    """Files, and the images in folders."""
    files = []
    for path in map(Path, arguments):
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise SystemExit(f'Image not found: {path}')
        inside = [p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES]
        if not inside:
            raise SystemExit(f'No images in the folder {path}')
        files += sorted(inside)
    return files


def _ranking_table(name: str, inspection: Inspection, meta: dict) -> Table:
    table = Table(
        'class', title=f'{name}: probability, %', title_justify='left'
    )
    for column in ('dense', 'compressed'):
        table.add_column(column, justify='right')
    for label, *both in inspection.ranking(meta):
        table.add_row(label, *(f'{100 * value:.1f}' for value in both))
    return table


@command()
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/visualize.py``."""
    args = parse_args(argv)
    files = _image_files(args.images)
    cfg = load_config(args)
    model, saved = load_model(cfg.model, args.checkpoint, args.device)
    require_structure(model)
    dense = None
    if args.dense_checkpoint:
        dense_cfg = ConfigDict(strip_compression(cfg.model.to_dict()))
        dense, _ = load_model(dense_cfg, args.dense_checkpoint, args.device)
    pipeline, meta = test_pipeline(cfg), dataset_meta(cfg, saved)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for name, figure in structure_figures(model).items():
        save_figure(figure, args.out_dir / f'{name}.png')
    seen: Counter[str] = Counter()
    lines: list[str | Table] = []
    with ProgressReporter('Drawing', len(files)) as report:
        for done, path in enumerate(files, 1):
            sample = pipeline(dict(img_path=str(path)))
            inspection = inspect(model, sample, dense)
            name = inspection.name
            seen[name] += 1
            if seen[name] > 1:  # of another folder
                name += f'_{seen[name]}'
            for kind, figure in inspection.figures(meta).items():
                save_figure(figure, args.out_dir / f'{name}_{kind}.png')
            if inspection.classifies:
                lines.append(_ranking_table(name, inspection, meta))
            else:
                changed = (inspection.dense != inspection.compressed).mean()
                lines.append(f'{name}: {changed:.1%} of the pixels differ')
            report(done)
    console = Console(highlight=False)
    for line in (*lines, f'Pictures: {args.out_dir}'):
        console.print(line)
