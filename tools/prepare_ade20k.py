"""See ``python tools/prepare_ade20k.py --help``."""

from pm_seg.cli.prepare_ade20k import main

if __name__ == '__main__':
    main()
