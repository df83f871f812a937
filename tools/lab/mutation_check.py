"""Do the tests notice deliberate faults?

Each fault of faults.py and device_faults.py is put into a temporary copy of
the package, one at a time, and the tests named with it run there until the
first failure. A fault that no test notices has survived, and the exit code is
1.

    python tools/lab/mutation_check.py
    python tools/lab/mutation_check.py --only merging --out faults.md
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import hypothesis  # noqa: F401  loaded once, for all runs
import pytest
import torch
from device_faults import DEVICE_FAULTS
from faults import FAULTS, Fault
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
ALL = (*FAULTS, *DEVICE_FAULTS)


class FirstFailure:
    """A pytest plugin that remembers which test failed."""

    def __init__(self) -> None:
        self.name = ''

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.split('[')[0].split('/')[-1]


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """Exit code of pytest and the first failure, in a process of its own."""
    context = multiprocessing.get_context('fork')
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        os.chdir(folder)
        sys.path[:0] = [str(folder)]
        quiet = os.open(folder / 'output.txt', os.O_WRONLY | os.O_CREAT)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        found = FirstFailure()
        paths = [f'{_within(name, "tests")}.py' for name in tests]
        brief = ['-x', '-p', 'no:cacheprovider', '--hypothesis-profile=brief']
        code = pytest.main([*brief, *paths], [found])
        send.send((int(code), found.name))

    process = context.Process(target=child)
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        return -1, ''
    finally:
        process.join()


def _within(name: str, root: str) -> Path:
    return Path(root, *(() if '/' in name else ('core',)), name)


def in_core(fault: Fault) -> bool:
    """Whether it and its tests need torch alone."""
    return not any('/' in name for name in (fault.module, *fault.tests))


def copy_package(folder: Path, core: bool) -> None:
    """The package and its tests, or the core without what needs OpenMMLab."""
    skip = shutil.ignore_patterns('__pycache__')
    folders = ('pm_seg', 'tests', 'configs', 'tools')
    files = ('pyproject.toml',)
    if core:
        folders = ('pm_seg/core', 'tests/core')
        helpers = ('conftest', 'paths', 'toy', 'devices')
        files += tuple(f'tests/{name}.py' for name in helpers)
    for name in folders:
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in files:
        shutil.copy(ROOT / name, folder / name)
    (folder / 'pm_seg/__init__.py').touch()


def check(fault: Fault, folder: Path) -> tuple[str, str]:
    """Outcome and the first test that fails."""
    path = folder / f'{_within(fault.module, "pm_seg")}.py'
    source = path.read_text()
    if source.count(fault.old) != 1:
        return 'not applied', f'{source.count(fault.old)} matches'
    path.write_text(source.replace(fault.old, fault.new))
    try:
        code, test = run_tests(folder, fault.tests)
    finally:
        path.write_text(source)
    if code == 0:
        return 'SURVIVED', ''
    # No test failed, say, because the module cannot be imported any more.
    return ('caught', test) if test else (f'broken ({code})', '')


def control(faults: Sequence[Fault], folder: Path) -> None:
    """Leave with a message if tests fail without any fault."""
    used = tuple(dict.fromkeys(test for f in faults for test in f.tests))
    code, test = run_tests(folder, used)
    if code:
        output = (folder / 'output.txt').read_text()
        sys.exit(f'{output[-3000:]}\nWithout any fault {test} fails')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    modules = list(dict.fromkeys(fault.module for fault in ALL))
    parser.add_argument('--only', nargs='+', choices=modules, default=modules)
    parser.add_argument('--match', default='', help='regular expression')
    parser.add_argument(
        '--no-control',
        action='store_true',
        help='do not run the tests without a fault first',
    )
    parser.add_argument('--out', help='Markdown file to write the table to')
    args = parser.parse_args(argv)
    sys.dont_write_bytecode = True  # a fault may leave size and time alone
    torch.set_num_threads(1)
    console = Console(width=100)
    table = Table('module', 'fault', 'outcome', 'first test that fails')
    lines = ['| module | fault | caught by |', '|---|---|---|']
    wrong = 0
    faults = [
        fault
        for fault in ALL
        if fault.module in args.only and re.search(args.match, fault.what)
    ]
    for core in (True, False):
        part = [fault for fault in faults if in_core(fault) == core]
        if not part:
            continue
        if not core:  # loaded once, for all runs
            import mmpretrain.models  # noqa: F401
            import mmseg.models  # noqa: F401
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            copy_package(folder, core)
            if not args.no_control:
                control(part, folder)
            for fault in part:
                outcome, test = check(fault, folder)
                wrong += outcome != 'caught'
                table.add_row(fault.module, fault.what, outcome, test)
                lines.append(f'| {fault.module} | {fault.what} | `{test}` |')
                print(f'{outcome}: {fault.module}, {fault.what}', flush=True)
    console.print(table)
    print(f'{len(faults) - wrong} of {len(faults)} faults caught')
    if args.out:
        Path(args.out).write_text('\n'.join(lines) + '\n')
    sys.exit(wrong > 0)


if __name__ == '__main__':
    main()
