"""See ``python tools/convert_checkpoint.py --help``."""

from pm_seg.cli.convert_checkpoint import main

if __name__ == '__main__':
    main()
