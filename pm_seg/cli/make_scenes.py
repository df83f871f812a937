"""Draw a dataset in ADE20K layout."""

from __future__ import annotations

import argparse

from ..datasets.scenes import write_scenes
from ..utils import ProgressReporter
from .parser import command, make_parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(
        'make_scenes.py',
        'Draw street and room scenes with the folders and class numbers of '
        'ADE20K, to try out configs without the real dataset.',
        ('400 to train on and 60 to validate on', 'data/scenes'),
        ('a handful', 'data/few --num-train 12 --num-val 4'),
    )
    parser.add_argument('root', help='folder to write to')
    group = parser.add_argument_group('what to draw')
    for name, default, what in (
        ('--num-train', 400, 'training scenes'),
        ('--num-val', 60, 'validation scenes'),
        ('--seed', 0, 'other seeds draw other scenes'),
    ):
        group.add_argument(
            name,
            type=int,
            default=default,
            metavar='N',
            help=f'{what} (default {default})',
        )
    return parser.parse_args(argv)


@command()
def main(argv: list[str] | None = None) -> None:
    """Entry point of ``tools/make_scenes.py``."""
    args = parse_args(argv)
    total = args.num_train + args.num_val
    with ProgressReporter('Drawing scenes', total) as report:
        for done, _ in write_scenes(
            args.root, args.num_train, args.num_val, args.seed
        ):
            report(done)
    print(f'Wrote {total} scenes to {args.root}')


if __name__ == '__main__':
    main()
