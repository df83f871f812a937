"""Scripts in processes of their own that need not import everything anew.

What the tools import takes five seconds, most of the time of a small run.
The server process of :mod:`multiprocessing` does it once; each script runs in
a fork of it, which nothing else has used.
"""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import unformatted  # noqa: F401

TESTS = Path(__file__).resolve().parent
TOOLS = ('compress', 'export_onnx', 'test', 'train')
PRELOADED = [f'pm_seg.cli.{name}' for name in TOOLS]

_server = multiprocessing.get_context('forkserver')
_server.set_forkserver_preload(PRELOADED)


def run_forked(
    arguments: Sequence[str], cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a Python script, as ``subprocess.run`` would.

    Args:
        arguments (Sequence[str]): The script and its arguments.
        cwd (Path): Where to run it.
        env (Mapping[str, str]): Its environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ('out', 'err')]
        process = _server.Process(
            target=_run, args=(list(arguments), str(cwd), dict(env), paths)
        )
        here = os.getcwd()
        os.chdir(TESTS.parent)  # what the server imports is found from there
        try:
            process.start()
        finally:
            os.chdir(here)
        process.join()
        out, err = (Path(path).read_text() for path in paths)
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _run(
    arguments: list[str], cwd: str, env: dict[str, str], paths: list[str]
) -> None:
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, 'w'), write_through=True)
        for number in (1, 2)
    )
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    own = [path for path in sys.path if not path.startswith(str(TESTS))]
    extra = [path for path in env.get('PYTHONPATH', '').split(':') if path]
    sys.path[:] = [str(Path(arguments[0]).resolve().parent), *extra, *own]
    sys.argv = arguments
    multiprocessing.set_start_method(None, force=True)  # nobody's choice yet
    gc.freeze()  # as in conftest.py
    runpy.run_path(arguments[0], run_name='__main__')
