"""The package as a whole: imports, registration, installation."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from forked import PRELOADED
from helpers import ROOT, dense_checkpoint, run_tool, small_config

from pm_seg.version import __version__


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
    """And what tools import says nothing, where run_tool does not see it."""
    script = (
        'import pm_seg; from mmseg.registry import MODELS, HOOKS; '
        "assert {'PMVisionTransformer', 'PMSegmenterMaskTransformerHead'} "
        '<= set(MODELS.module_dict); '
        "assert {'PruneMergeHook', 'ProgressHook'} <= set(HOOKS.module_dict)"
        f'; import {", ".join(PRELOADED)}'
    )
    out = run_tool('-W', 'error::UserWarning', '-c', script, fresh=True)
    assert not out.stdout + out.stderr


@pytest.fixture(scope='module')
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as pip installs it from the source distribution."""
    folder = tmp_path_factory.mktemp('package')
    ignore = shutil.ignore_patterns(
        '.venv*', '.git', 'work_dirs', 'data', 'checkpoints', 'build',
        '*.egg-info', '__pycache__',
    )  # fmt: skip
    shutil.copytree(ROOT, folder / 'source', ignore=ignore)
    pip = [sys.executable, '-m', 'pip', '--quiet']
    isolated = ['--no-deps', '--no-build-isolation']
    sdist = 'from setuptools.build_meta import build_sdist as build'
    for command in (
        [sys.executable, '-c', f"{sdist}; build('../dist')"],
        [*pip, 'wheel', *isolated, '-w', '../dist', 'SDIST'],
        [*pip, 'install', '--no-deps', '--target', '../site', 'WHEEL'],
    ):
        found = {
            'SDIST': next(folder.glob('dist/*.tar.gz'), None),
            'WHEEL': next(folder.glob('dist/*.whl'), None),
        }
        command = [str(found.get(word, word)) for word in command]
        result = subprocess.run(
            command, cwd=folder / 'source', capture_output=True, text=True
        )
        if "No module named 'setuptools'" in result.stderr:
            pytest.skip('setuptools is not installed')
        assert result.returncode == 0, result.stderr
    return folder / 'site'


def test_installed_copy_brings_its_configs(site: Path, tmp_path: Path) -> None:
    """From sdist to wheel to another folder than the checkout."""
    script = (
        f'import sys; sys.path.insert(0, {str(site)!r}); import pm_seg; '
        'from pm_seg.cli.config import resolve_config; '
        "print(resolve_config('configs/segmenter_vit-s_pm_ade20k.py'))"
    )
    out = run_tool('-c', script, cwd=tmp_path, fresh=True)
    path = Path(out.stdout.strip().splitlines()[-1])
    assert path == (site / 'pm_seg/.mim/configs/segmenter_vit-s_pm_ade20k.py')
    assert (site / 'pm_seg/.mim/tools/train.py').is_file()
    assert not (site / 'pm_seg/.mim/tools/lab').exists()


def test_installed_copy_compresses(
    site: Path, scenes: Path, tmp_path: Path
) -> None:
    """Report and all, without a checkout."""
    cfg = small_config(scenes, tmp_path / 'work')
    cfg.dump(tmp_path / 'config.py')
    dense = dense_checkpoint(cfg, tmp_path)
    env = dict(PYTHONPATH=str(site))
    out = run_tool('-m', 'pm_seg.env', cwd=tmp_path, env=env, fresh=True)
    assert __version__ in out.stdout and str(site) in out.stdout
    run_tool(
        site / 'pm_seg/.mim/tools/compress.py', 'config.py', dense,
        '--out', 'pm.pth', '--report', 'report.html', '--calib-batches', '2',
        cwd=tmp_path, env=env, fresh=True,
    )  # fmt: skip
    assert (tmp_path / 'pm.pth').is_file()
    assert (tmp_path / 'report.html').stat().st_size > 50_000


def test_requirements_do_not_pull_a_stack_in() -> None:
    """Installing pm_seg never replaces an OpenMMLab stack."""
    lines = (ROOT / 'requirements/runtime.txt').read_text().lower()
    assert 'mm' not in lines and 'onedl' not in lines
