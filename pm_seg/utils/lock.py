"""One training run in a work directory at a time.

Not by ``filelock``: its ``flock`` is shared with the processes that load
images, which outlive a killed run, and it empties the file that says whose
lock it is.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None

LOCK_NAME = '.lock'


class WorkDirInUseError(RuntimeError):
    """Another live process trains in the work directory."""


@contextmanager
def work_dir_lock(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a work directory, made if needed, inside the block.

    The lock is the system's (``fcntl.lockf``) on the file ``.lock``, which
    says whose it is. It ends with its process, however that ends. File systems
    and platforms without locks do without.

    Raises:
        WorkDirInUseError: If a live process holds it; names that process.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(folder / LOCK_NAME, 'a+') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise WorkDirInUseError(
                f'{folder} is in use by {file.read() or "another process"}. '
                'Two runs in one work directory would overwrite and delete '
                "each other's checkpoints: wait for that one, stop it (kill "
                '-INT saves a checkpoint first), or give this one a folder '
                'of its own with --work-dir'
            ) from None
        except OSError as error:
            print(
                f'{folder} is on a file system without locks ({error}): '
                'see to it yourself that no other run uses it',
                file=sys.stderr,
            )
        else:
            file.seek(0)
            if left := file.read():
                print(
                    f'Taking over {folder} from {left}, which ended before '
                    'its run did',
                    file=sys.stderr,
                )
        file.truncate(0)
        file.write(
            f'process {os.getpid()} on {socket.gethostname()}, since '
            f'{datetime.now():%Y-%m-%d %H:%M:%S}'
        )
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
