"""See ``python tools/export_onnx.py --help``."""

from pm_seg.cli.export_onnx import main

if __name__ == '__main__':
    main()
