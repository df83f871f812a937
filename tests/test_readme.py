"""Every command of the README and of docs/commands.md is run by a test or by
CI.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, dense_checkpoint, small_config
from howto import commands, run_line

TOOLS = 'tests/cli/test_tools.py'
ADE20K = f'{TOOLS}::test_the_main_ade20k_config_runs_on_scenes'
CONVERT = 'tests/cli/test_convert_checkpoint.py'
MAKE = 'Makefile'
PAGES = ('README.md', 'docs/commands.md')

#: How each command is run. A test's name: by that test, with a smaller model
#: or fewer steps. MAKE: it is a recipe of the Makefile, which .ci/run runs.
#: Arguments: below, as it stands there with these added.
RUN_BY: dict[str, str | list[str]] = {
    'make demo': f'{TOOLS}::test_demo',
    'make test': MAKE,
    'pip install torch torchvision': MAKE,
    'pip install -r requirements/mminstall.txt': MAKE,
    'pip install -e .': MAKE,
    'python tools/train.py configs/segmenter_vit-s_pm_ade20k.py': ADE20K,
    'python tools/compress.py CONFIG DENSE.pth --out PM.pth --keep 0.5': [
        '--calib-batches', '1',
    ],
    'python tools/test.py CONFIG PM.pth --show-dir pictures': [],
    'python tools/benchmark.py CONFIG --modes eager compiled': [
        '--rounds', '2', '--modes', 'eager', '--keep', '0.9',
    ],
    'python tools/export_onnx.py CONFIG PM.pth --out PM.onnx': [],
    'python tools/visualize.py CONFIG PM.pth IMAGES --out-dir pictures':
    'tests/cli/test_visualize.py::test_a_folder_of_images_is_drawn',
    'python -m pm_seg.env': 'tests/test_env.py::test_report',
    'tools/dist_train.sh CONFIG 8': [],
    'python tools/make_scenes.py data/scenes': f'{TOOLS}::test_make_scenes',
    'python tools/train.py configs/segmenter_vit-s_pm_ade20k.py '
    '--cfg-options data_root=data/scenes load_from=None '
    'train_cfg.max_iters=20': ADE20K,
    'python tools/convert_checkpoint.py segmenter seg_small/checkpoint.pth '
    'seg_s.pth': f'{CONVERT}::test_segmenter_with_variant',
}  # fmt: skip


def test_every_command_is_run_by_something() -> None:
    found = [c for page in PAGES for c in commands(page)]
    assert len(found) > 10
    unknown = [command for command in found if command not in RUN_BY]
    assert not unknown, (
        'nothing runs these commands; write a test and name it '
        f'in RUN_BY: {unknown}'
    )
    gone = set(RUN_BY) - set(found)
    assert not gone, f'on neither page: {gone}'


@pytest.mark.parametrize(
    'command', [c for c, how in RUN_BY.items() if isinstance(how, str)]
)
def test_what_runs_it_is_there(command: str) -> None:
    how = RUN_BY[command]
    if how != MAKE:
        file, _, name = how.partition('::')
        assert f'\ndef {name}(' in (ROOT / file).read_text()
        return
    assert 'make test\n' in (ROOT / '.ci/run').read_text()
    recipes = (ROOT / 'Makefile').read_text().replace('\\\n', ' ')
    torch = re.search(r'^TORCH \?= (.*)$', recipes, re.M)[1]
    recipes = recipes.replace('$(TORCH)', torch)
    if command.startswith('pip'):
        wanted = command.removeprefix('pip install ')
        lines = re.findall(r'pip install --progress-bar off (.*)', recipes)
        assert any(wanted in ' '.join(line.split()) for line in lines)
    else:
        assert f'\n{command.split()[1]}:' in recipes


@pytest.mark.slow
def test_commands_as_they_stand(tmp_path: Path, scenes: Path) -> None:
    """In order, with CONFIG a small model and 2 processes instead of 8."""
    cfg = small_config(scenes, tmp_path / 'work')
    cfg.dump(tmp_path / 'config.py')
    shutil.move(dense_checkpoint(cfg, tmp_path), tmp_path / 'DENSE.pth')
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    for command, extra in RUN_BY.items():
        if isinstance(extra, str):
            continue
        line = command.replace('CONFIG', 'config.py')
        line = re.sub(r'(config.py) 8$', r'\1 2', line)
        run_line(' '.join([line, *extra]), tmp_path)
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 3
    assert (tmp_path / 'PM.onnx').stat().st_size > 1e5
    assert (tmp_path / 'work/iter_2.pth').is_file()
