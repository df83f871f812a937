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


class WholeFileBackend(LocalBackend):
    """Local files, written to their end or not at all, and removed last."""

    def __init__(self) -> None:
        self._outdated: list[tuple[str, int]] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        with (
            whole_files(Path(filepath)) as (partial,),
            open(partial, 'wb') as file,
        ):
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())

    def remove(self, filepath: str | Path) -> None:
        self._outdated.append((filepath, os.stat(filepath).st_ino))

    def clean_up(self) -> None:
        """Remove what there was to remove."""
        for path, inode in self._outdated:
            # A file written since under the same name stays.
            if os.path.exists(path) and os.stat(path).st_ino == inode:
                os.remove(path)
        self._outdated.clear()


register_backend('whole_file', WholeFileBackend, force=True)


@register('HOOKS')
class WholeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, safe against crashes and full disks.

    The base class removes the oldest (or the previous best) checkpoint, then
    writes the new one in place: with ``max_keep_ckpts=1`` a crash or a full
    disk in between leaves nothing. It takes the same arguments. Modifications,
    for local folders:

    - a checkpoint appears under its name when it is whole;
    - older ones are removed after that;
    - a file that cannot be written stops the run with the last good
      checkpoint named, and leaves no part of itself.

    ``tools/train.py`` uses it in place of the base class.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        local = '://' not in str(self.out_dir or '')
        if local and self.backend_args is None is self.file_client_args:
            self.backend_args = dict(backend='whole_file')

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
        if not isinstance(self.file_backend, WholeFileBackend):
            yield
            return
        try:
            yield
        except OSError as error:
            raise RunStoppedError(
                f'Cannot save to {self.out_dir} at iteration '
                f'{runner.iter + 1}: {error}. Nothing was removed. Make room '
                'or choose another folder with --work-dir. '
                f'{how_to_go_on(self.out_dir)}'
            ) from error
        self.file_backend.clean_up()
