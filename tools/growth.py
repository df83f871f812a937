"""See ``python tools/growth.py --help``."""

from pm_seg.cli.growth import main

if __name__ == '__main__':
    main()
