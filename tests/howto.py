"""What the how-to pages contain: files and commands.

In a clone with an environment, run a page as it is written, and print what a
newcomer sees:

    .venv/bin/python tests/howto.py docs/howto/choose_a_budget.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from helpers import ROOT, free_port

_FILE = re.compile(
    r'`(my_project/[\w/.]+)`[^\n]*\n\n```python\n(.*?)```', re.S
)
_ONE_THREAD = {'OMP_NUM_THREADS': '1'}
_SHELL = re.compile(r'```sh\n(.*?)```', re.S)


def write_files(page: str, folder: Path) -> list[Path]:
    """Write the files a page of docs/ shows into a folder."""
    written = []
    for name, content in _FILE.findall((ROOT / page).read_text()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        written.append(path)
    return written


def commands(page: str) -> list[str]:
    """Commands in the ``sh`` blocks of a page, comments taken off."""
    found = []
    for block in _SHELL.findall((ROOT / page).read_text()):
        for line in block.replace('\\\n', ' ').splitlines():
            line = re.sub(r'(^|\s+)#.*', '', line)
            if line.strip():
                found.append(' '.join(line.split()))
    return found


def shell_environment() -> dict[str, str]:
    """For ``bash``: this Python first, and a free port for torchrun."""
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    return {
        **os.environ,
        'PATH': path,
        'PORT': str(free_port()),
        **_ONE_THREAD,
    }


def run_line(
    line: str, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command as it is typed in a folder; it has to succeed."""
    result = subprocess.run(
        ['bash', '-c', line],
        cwd=folder,
        env=shell_environment() | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f'{line}\n{result.stderr[-3000:]}'
    return result


def main(page: str) -> None:
    """Write a page's files, then run its commands in the page's folder."""
    files = write_files(page, ROOT)
    # "my_project" is where the commands of a page with a project are typed.
    inside = any(path.name.endswith('_dataset.py') for path in files)
    folder = ROOT / 'my_project' if inside else ROOT
    environment = {**shell_environment(), 'COLUMNS': '80'}
    if 'OMP_NUM_THREADS' not in os.environ:
        del environment['OMP_NUM_THREADS']
    for command in commands(page):
        if re.search(r'\b[A-Z]{3,}\b(?!=)', command.split(' --')[0]):
            print(f'$ {command}\n(not run: names to fill in)\n', flush=True)
            continue
        print(f'$ {command}', flush=True)
        start = time.perf_counter()
        result = subprocess.run(
            ['bash', '-c', command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(result.stdout.rstrip())
        seconds = time.perf_counter() - start
        print(f'(exit status {result.returncode}, {seconds:.0f} s)\n')


if __name__ == '__main__':
    main(*sys.argv[1:])
