"""See ``python tools/visualize.py --help``."""

from pm_seg.cli.visualize import main

if __name__ == '__main__':
    main()
