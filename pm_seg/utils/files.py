"""Files that are written to their end or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_files(*targets: Path) -> Iterator[list[Path]]:
    """Where to write files inside the block; they are renamed at its end.

    Folders are created. Nothing is left, and what stood there stays, if the
    block raises. Processes that write the same file do not mix: the last to
    end wins.
    """
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    suffix = f'.{os.getpid()}.partial'
    partials = [path.with_name(path.name + suffix) for path in targets]
    try:
        yield partials
        for partial, target in zip(partials, targets):
            os.replace(partial, target)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
