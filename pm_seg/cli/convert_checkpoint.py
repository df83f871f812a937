"""Convert checkpoints of other code bases."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..convert import CONVERTERS, read_source, write_converted
from ..convert.results import NORMALIZATIONS
from ..convert.sources import pair
from ..utils.checkpoints import CheckpointError
from ..utils.quiet import quiet_warnings
from .common import check_environment, check_output
from .parser import command, make_parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'convert_checkpoint.py',
        'Convert a checkpoint of another code base. Writes a checkpoint and, '
        'beside it with the ending .py, the config of the model. Code in the '
        'input is never run.',
        (
            'the Segmenter repository',
            'segmenter seg_small_mask/checkpoint.pth '
            'checkpoints/seg_small.pth',
        ),
        (
            "a ViT with timm's names",
            'timm vit_tiny_patch16_224.npz checkpoints/vit-tiny_in1k.pth',
        ),
    )
    parser.add_argument(
        'kind',
        choices=CONVERTERS,
        help="timm: ViT, DeiT or MAE classifiers with timm's names; "
        'segmenter: the Segmenter repository (reads variant.yml beside the '
        'input); pm-vit and pm-segmenter: released Prune-and-Merge models',
    )
    parser.add_argument('input', help='.pth, .npz or .safetensors file')
    parser.add_argument('output', help='checkpoint to write, *.pth')
    group = parser.add_argument_group('what the input does not say')
    group.add_argument(
        '--num-heads',
        type=int,
        metavar='N',
        help='heads of the encoder, if the input does not say; defaults to '
        '64 channels each',
    )
    group.add_argument(
        '--img-size',
        type=int,
        nargs='+',
        metavar=('HEIGHT', 'WIDTH'),
        help='image size of the position embedding; defaults to a square',
    )
    group.add_argument(
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
    quiet_warnings()
    check_environment()
    targets = [Path(args.output), Path(args.output).with_suffix('.py')]
    if targets[0].suffix != '.pth':
        raise SystemExit(
            f'Cannot write {args.output}: expected a name that ends in .pth'
        )
    for target in targets:
        check_output(target)
    try:
        state, hints = read_source(
            args.input,
            num_heads=args.num_heads,
            img_size=args.img_size and pair(args.img_size),
            normalization=args.normalization,
        )
        for target in targets:
            if target.exists() and target.samefile(args.input):
                raise SystemExit(
                    f'Cannot write {target}: it is the input; choose another '
                    'output'
                )
        converted = CONVERTERS[args.kind](state, hints)
        origin = f'{args.kind} {Path(args.input).name}'
        config = write_converted(converted, args.output, origin)
    except (CheckpointError, OSError) as error:
        raise SystemExit(f'Cannot convert {args.input}: {error}') from None
    for note in converted.notes:
        print(f'Note: {note}')
    print(f'Wrote {args.output} and {config}')


if __name__ == '__main__':
    main()
