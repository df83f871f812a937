"""Command line tools, started by ``tools/*.py``."""
