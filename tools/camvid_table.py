"""See ``python tools/camvid_table.py --help``."""

from pm_seg.cli.camvid_table import main

if __name__ == '__main__':
    main()
