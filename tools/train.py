"""See ``python tools/train.py --help``."""

from pm_seg.cli.train import main

if __name__ == '__main__':
    main()
