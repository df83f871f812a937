"""See ``python tools/test.py --help``."""

from pm_seg.cli.test import main

if __name__ == '__main__':
    main()
