"""The documentation agrees with the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, run_tool
from howto import commands
from mmengine.config import Config

from pm_seg.core import ProgressiveCompressor, StaticCompressor
from pm_seg.core.schedule import SCHEDULES

PAGES = sorted([*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')])


def test_the_api_page_is_up_to_date() -> None:
    run_tool(ROOT / 'tools/make_api_docs.py', '--check')


def heading_ids(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    titles = re.findall(r'^#+ (.*)$', text, flags=re.M)
    return {
        re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')
        for title in titles
    }


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.S)
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' in target:
            continue
        name, _, anchor = target.partition('#')
        file = (page.parent / name) if name else page
        assert file.exists(), f'{page}: {target}'
        if anchor:
            assert anchor in heading_ids(file), f'{page}: {target}'


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_files_named_in_the_text_exist(page: Path) -> None:
    """Paths in backticks, from the root of the repository."""
    pattern = r'`((?:pm_seg|tools|configs|tests|docs|requirements)/[\w./-]+)`'
    for name in re.findall(pattern, page.read_text()):
        assert (ROOT / name).exists(), f'{page}: {name}'


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.name)
def test_tools_and_flags_in_commands_exist(page: Path) -> None:
    sources = [*ROOT.glob('pm_seg/cli/*.py'), *ROOT.glob('tools/**/*.py')]
    known = set(
        re.findall(r"'(--[\w-]+)'", ''.join(f.read_text() for f in sources))
    )
    for command in commands(str(page.relative_to(ROOT))):
        tool = re.search(r'(?:^|[ /])(tools/[\w/.]+)', command)
        if tool:
            assert (ROOT / tool[1]).is_file(), f'{page}: {command}'
            unknown = set(re.findall(r' (--[\w-]+)', command)) - known
            assert not unknown, f'{page}: {command}'


@pytest.mark.parametrize(
    'build, number', [(ProgressiveCompressor, 0), (StaticCompressor, 1)]
)
def test_all_options_are_in_the_how_to(build: type, number: int) -> None:
    """With the defaults of the class, in its order."""
    text = (ROOT / 'docs/howto/compress_my_model.md').read_text()
    table = text.split('\n| option | meaning | default |\n')[number + 1]
    table = table.split('\n\n')[0]
    found = re.findall(r'^\| `(\w+)` \| .* \| `(.*)` \|$', table, flags=re.M)
    parameters = list(inspect.signature(build).parameters.values())[1:]
    assert found == [(p.name, repr(p.default)) for p in parameters]


def python_blocks(page: str, after: str) -> list[str]:
    """Python blocks of a page, below a heading."""
    text = (ROOT / page).read_text().split(f'\n## {after}\n')[1]
    return re.findall(r'```python\n(.*?)```', text.split('\n## ')[0], re.S)


@pytest.fixture
def cosine() -> Iterator[None]:
    """The schedule of CONTRIBUTING, for one test."""
    source = python_blocks('CONTRIBUTING.md', 'Extend: a schedule')[0]
    exec(compile(source, 'my_schedule.py', 'exec'), {})
    yield
    del SCHEDULES['cosine']


@pytest.mark.usefixtures('cosine')
def test_the_schedule_of_contributing() -> None:
    """Its shares, and a segmentor that is compressed by them."""
    shares = SCHEDULES['cosine'](1.0, 5, 0.6, 1)
    assert shares == pytest.approx([1, 1 - 0.1464, 0.5, 0.1464, 0.1], abs=1e-4)
    assert SCHEDULES['cosine'](0.0, 5, 0.6, 1) == [1.0] * 5

    model = tiny.build(schedule='cosine', keep=0.7, first=0)
    compressor = model.backbone.compressor
    assert 0.5 < compressor.share <= 0.7
    kept = [load.kept for load in compressor.loads()]
    assert kept == sorted(kept, reverse=True) and kept[-1] < 16
    images = torch.randn(1, 3, 96, 64)
    assert model.eval()(images, mode='tensor').shape == (1, 5, 6, 4)


def test_the_config_of_contributing() -> None:
    block = python_blocks('CONTRIBUTING.md', 'Extend: a schedule')[1]
    cfg = Config.fromstring(block.replace(", 'my_schedule'", ''), '.py')
    assert cfg.model.backbone.compression.schedule == 'cosine'


def test_the_profile_of_contributing(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    (source,) = python_blocks('CONTRIBUTING.md', 'Profile')
    exec(compile(source, 'profile.py', 'exec'), {})
    assert 'Self CPU' in capsys.readouterr().out
