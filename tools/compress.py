"""See ``python tools/compress.py --help``."""

from pm_seg.cli.compress import main

if __name__ == '__main__':
    main()
