"""The package as a whole: imports, registration, installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, run_tool


def test_core_needs_torch_alone(tmp_path: Path) -> None:
    """The core imports no OpenMMLab package."""
    for path in (ROOT / 'pm_seg' / 'core').glob('*.py'):
        for line in path.read_text().splitlines():
            if line.startswith(('import', 'from')):
                assert not line.split()[1].startswith('mm'), f'{path}: {line}'
    target = tmp_path / 'site' / 'pm_seg'
    target.mkdir(parents=True)
    shutil.copytree(ROOT / 'pm_seg/core', target / 'core')
    (target / '__init__.py').touch()
    script = (
        "import sys; sys.modules.update({n: None for n in ('mmseg', 'mmcv', "
        "'mmengine', 'mmpretrain')}); import torch, pm_seg.core as c; "
        'cost = c.LayerCost(2304, 4608, 48); '
        'shape = c.EncoderShape(4, (4, 4), 1, 24, 8, cost); '
        'm = c.make_compressor(dict(keep=0.6), shape); '
        'x = torch.rand(1, 17, 24); layers = [lambda x, size=None: x] * 4; '
        'assert torch.equal(m.run(layers, x, (4, 4)).last, x)'
    )
    subprocess.run(
        [sys.executable, '-c', script], cwd=tmp_path / 'site', check=True
    )


def test_import_registers_everything() -> None:
    script = (
        'import pm_seg; from mmseg.registry import MODELS, HOOKS; '
        "assert {'PMVisionTransformer', 'PMSegmenterMaskTransformerHead'} "
        '<= set(MODELS.module_dict); '
        "assert {'PruneMergeHook', 'ProgressHook'} <= set(HOOKS.module_dict)"
    )
    out = run_tool('-W', 'error::UserWarning', '-c', script)
    assert not out.stdout


def test_installed_copy_brings_its_configs(tmp_path: Path) -> None:
    """pip install . into a folder, used from another one."""
    source = tmp_path / 'source'
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            '.venv*', '.git', 'work_dirs', 'data', 'checkpoints', 'build'
        ),
    )
    site = tmp_path / 'site'
    result = subprocess.run(
        [
            sys.executable, '-m', 'pip', 'install', '--no-deps', '--quiet',
            '--no-build-isolation', '--target', str(site), str(source),
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if 'setuptools' in result.stderr and 'BackendUnavailable' in result.stderr:
        pytest.skip('setuptools is not installed')
    assert result.returncode == 0, result.stderr
    script = (
        f'import sys; sys.path.insert(0, {str(site)!r}); import pm_seg; '
        'from pm_seg.cli.common import resolve_config; '
        'from pm_seg.visualization import report; '
        "report._PAGES.get_template('report.html.jinja'); "
        "print(resolve_config('configs/segmenter_vit-s_pm_ade20k.py'))"
    )
    out = run_tool('-c', script, cwd=tmp_path)
    path = Path(out.stdout.strip().splitlines()[-1])
    assert path == (site / 'pm_seg/.mim/configs/segmenter_vit-s_pm_ade20k.py')
    assert (site / 'pm_seg/.mim/tools/train.py').is_file()


def test_requirements_do_not_pull_a_stack_in() -> None:
    """Installing pm_seg never replaces an OpenMMLab stack."""
    lines = (ROOT / 'requirements/runtime.txt').read_text().lower()
    assert 'mm' not in lines and 'onedl' not in lines
