"""Command line tools; ``tools/*.py`` and ``python -m pm_seg.cli.NAME``."""
