"""Checkpoints that are written whole before older ones go."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from ...registry import register
from ...utils.files import whole_files
from ..faults import RunStoppedError, how_to_go_on

BACKEND = 'whole_file'


class WholeFileBackend(LocalBackend):
    """Local files that are written to their end or not at all."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        with (
            whole_files(Path(filepath)) as (partial,),
            open(partial, 'wb') as file,
        ):
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())


register_backend(BACKEND, WholeFileBackend, force=True)


class _LaterRemovals:
    """A file backend that keeps what it is told to remove for later."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        self._wanted: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._wanted.append((path, os.stat(path).st_ino))

    def carry_out(self) -> None:
        for path, inode in self._wanted:
            # A file written since under the same name stays.
            if os.path.exists(path) and os.stat(path).st_ino == inode:
                self._backend.remove(path)


@register('HOOKS')
class WholeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, safe against crashes and full disks.

    The base class removes the oldest (or the previous best) checkpoint, then
    writes the new one in place: with ``max_keep_ckpts=1`` a crash or a full
    disk in between leaves nothing. Modifications, for local folders:

    - a checkpoint appears under its name when it is whole;
    - older ones are removed after that;
    - a file that cannot be written stops the run with the last good
      checkpoint named, and leaves no part of itself.

    ``tools/train.py`` uses it in place of the base class.

    Args:
        **kwargs: See the base class.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._local = (
            '://' not in str(self.out_dir or '')
            and self.backend_args is None
            and self.file_client_args is None
        )
        if self._local:
            self.backend_args = dict(backend=BACKEND)

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict
    ) -> None:
        with self._safely(runner):
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        with self._safely(runner):
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _safely(self, runner: Runner) -> Iterator[None]:
        if not self._local or isinstance(self.file_backend, _LaterRemovals):
            yield
            return
        backend = self.file_backend
        self.file_backend = later = _LaterRemovals(backend)
        try:
            yield
            later.carry_out()
        except (OSError, RuntimeError) as error:
            if isinstance(error, RunStoppedError) or not _about_files(error):
                raise
            raise RunStoppedError(
                f'Cannot save to {self.out_dir} at iteration '
                f'{runner.iter + 1}: {error}. Nothing was removed. Make room '
                'or choose another folder with --work-dir. '
                f'{how_to_go_on(self.out_dir)}'
            ) from error
        finally:
            self.file_backend = backend


def _about_files(error: Exception) -> bool:
    """Whether torch or the system could not write a file."""
    return isinstance(error, OSError) or 'PytorchStreamWriter' in str(error)
