"""See ``python tools/benchmark.py --help``."""

from pm_seg.cli.benchmark import main

if __name__ == '__main__':
    main()
