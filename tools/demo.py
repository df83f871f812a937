"""See ``python tools/demo.py --help``."""

from pm_seg.cli.demo import main

if __name__ == '__main__':
    main()
