r"""Convert a checkpoint of another code base.

Writes a checkpoint and, beside it with the ending .py, the config of the
model. Code in the input is never run.

examples:
  # the Segmenter repository
  python tools/convert_checkpoint.py segmenter seg_small_mask/checkpoint.pth \
      checkpoints/seg_small.pth
  # a ViT with timm's names
  python tools/convert_checkpoint.py timm vit_tiny_patch16_224.npz \
      checkpoints/vit-tiny_in1k.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..convert import CONVERTERS, read_source, write_converted
from ..convert.results import NORMALIZATIONS
from ..convert.sources import pair
from ..utils.checkpoints import CheckpointError
from .arguments import make_parser, output_file
from .config import check_environment
from .ending import command


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser('convert_checkpoint.py', __doc__)
    add = parser.add_argument
    add(
        'kind',
        choices=CONVERTERS,
        help="timm: ViT, DeiT or MAE classifiers with timm's names; "
        'segmenter: the Segmenter repository (reads variant.yml beside the '
        'input); pm-vit and pm-segmenter: released Prune-and-Merge models',
    )
    add('input', help='.pth, .npz or .safetensors file')
    add('output', type=output_file, help='checkpoint to write, *.pth')
    add = parser.add_argument_group('what the input does not say').add_argument
    add(
        '--num-heads',
        type=int,
        help='heads of the encoder; defaults to 64 channels each',
    )
    add(
        '--img-size',
        type=int,
        nargs='+',
        metavar=('HEIGHT', 'WIDTH'),
        help='image size of the position embedding; defaults to a square',
    )
    add(
        '--normalization',
        choices=NORMALIZATIONS,
        help='pixel mean and std the model was trained with: 127.5 (vit) or '
        "ImageNet's",
    )
    return parser.parse_args(argv)


@command('Nothing was written.')
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/convert_checkpoint.py``."""
    args = parse_args(argv)
    check_environment()
    if args.output.suffix != '.pth':
        raise SystemExit(
            f'Cannot write {args.output}: expected a name that ends in .pth'
        )
    config = output_file(args.output.with_suffix('.py'))
    try:
        state, hints = read_source(
            args.input,
            num_heads=args.num_heads,
            img_size=args.img_size and pair(args.img_size),
            normalization=args.normalization,
        )
        for target in (args.output, config):
            if target.exists() and target.samefile(args.input):
                raise SystemExit(
                    f'Cannot write {target}: it is the input; choose another '
                    'output'
                )
        converted = CONVERTERS[args.kind](state, hints)
        origin = f'{args.kind} {Path(args.input).name}'
        write_converted(converted, args.output, origin)
    except (CheckpointError, OSError) as error:
        raise SystemExit(f'Cannot convert {args.input}: {error}') from None
    for note in converted.notes:
        print(f'Note: {note}')
    print(f'Wrote {args.output} and {config}')
