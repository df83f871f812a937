"""What matters in a bug report: ``python -m pm_seg.env``.

Imports nothing of the OpenMMLab stack until it has said what is installed,
so that it can be asked why a stack does not work.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from pm_seg.stacks import Stacks, installed_stacks, version
from pm_seg.version import __version__

ROOT = Path(__file__).resolve().parents[1]

PACKAGES = ('torchvision', 'numpy', 'opencv-python', 'timm')
ONNX = ('onnx', 'onnxruntime', 'onnxscript', 'onnxruntime-gpu')


def imports(name: str) -> str:
    """'' if a package imports, else why it does not, in a line."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            # Some packages make filters let all pass.
            warnings.showwarning = lambda *args, **kwargs: None
            importlib.import_module(name)
    except Exception as error:  # whatever a broken stack raises
        reason = (str(error).splitlines() or [''])[0]
        return f'does not import: {type(error).__name__}: {reason}'
    return ''


def commit(root: Path = ROOT) -> str:
    """Commit of a checkout, '-dirty' if files differ; '' elsewhere."""
    if not (root / '.git').exists():
        return ''
    git = ['git', '-C', root, 'describe', '--always', '--dirty', '--exclude=*']
    try:
        name = subprocess.check_output(
            git, stderr=subprocess.DEVNULL, text=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return ''
    return f'commit {name.strip()}'


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path('/proc/cpuinfo')
    text = info.read_text() if info.is_file() else ''
    found = re.search(r'^model name\s*: (.+)$', text, re.M)
    return found[1] if found else platform.processor() or platform.machine()


def _torch() -> Iterator[tuple[str, str]]:
    try:
        import torch
    except Exception as error:
        yield 'torch', f'does not import: {error}'
        return
    yield 'torch', torch.__version__
    if not torch.cuda.is_available():
        yield 'GPU', 'none that torch can use'
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield (
            f'GPU {index}',
            f'{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, '
            f'compute capability {gpu.major}.{gpu.minor}',
        )
    yield 'CUDA of torch', torch.version.cuda or 'none'
    yield 'threads', str(torch.get_num_threads())


def _stack(stacks: Stacks) -> Iterator[tuple[str, str]]:
    yield 'OpenMMLab stack', stacks.kind
    for name, owners in stacks.found.items():
        found = ', '.join(f'{number} ({d})' for d, number in owners.items())
        problem = imports(name) if found else 'not installed'
        yield f'  {name}', '; '.join(filter(None, [found, problem]))
    if importlib.util.find_spec('mmseg') is not None:
        problem = imports('pm_seg.models')
        yield '  with pm_seg', problem or 'its classes register'


def main() -> int:
    """Print the report, a line for each item; 1 if the stack is mixed."""
    stacks = installed_stacks()
    problem = stacks.problem()
    ours = [__version__, commit(), f'in {ROOT}']
    onnx = [f'{name} {version(name)}' for name in ONNX if version(name)]
    rows = [
        ('pm_seg', ', '.join(filter(None, ours))),
        ('python', f'{platform.python_version()}, {sys.executable}'),
        ('system', platform.platform()),
        ('CPU', f'{processor()}, {os.cpu_count()} cores'),
        *_torch(),
        *((name, version(name) or 'not installed') for name in PACKAGES),
        *_stack(stacks),
        ('ONNX', ', '.join(onnx) or 'not installed'),
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f'{name:<{width}}  {text}')
    if problem:
        print(f'\nMIXED STACK: {problem}')
    elif not stacks.versions:
        print(
            '\nNote: only pm_seg.core works. For the rest: pip install -r '
            'requirements/mminstall.txt'
        )
    return int(problem is not None)


if __name__ == '__main__':
    sys.exit(main())
