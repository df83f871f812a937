"""Draw a dataset in ADE20K layout."""

from __future__ import annotations

import argparse

from ..datasets.scenes import write_scenes
from ..utils import ProgressReporter


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog='make_scenes.py',
        description='Draw street and room scenes with the folders and class '
        'numbers of ADE20K, to try out configs without the real dataset.',
        epilog='Example: python tools/make_scenes.py data/scenes; python '
        'tools/train.py configs/segmenter_vit-s_pm_ade20k.py --cfg-options '
        'data_root=data/scenes load_from=None',
    )
    parser.add_argument('root', help='folder to write to')
    parser.add_argument('--num-train', type=int, default=400)
    parser.add_argument('--num-val', type=int, default=60)
    parser.add_argument('--seed', type=int, default=0)
    return parser.parse_args(argv)


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
