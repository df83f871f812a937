"""See ``python tools/gpu_report.py --help``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / 'lab'))

if __name__ == '__main__':
    from gpu_report import main

    main()
