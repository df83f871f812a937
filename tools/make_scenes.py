"""See ``python tools/make_scenes.py --help``."""

from pm_seg.cli.make_scenes import main

if __name__ == '__main__':
    main()
