"""The documentation agrees with the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, run_tool
from mmengine.config import Config

from pm_seg.core import BUILDERS
from pm_seg.engine import compress

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


def python_blocks(page: str, after: str) -> list[str]:
    """Python blocks of a page, below a heading."""
    text = (ROOT / page).read_text().split(f'\n## {after}\n')[1]
    return re.findall(r'```python\n(.*?)```', text.split('\n## ')[0], re.S)


@pytest.fixture
def city_block() -> Iterator[None]:
    """The builder of CONTRIBUTING, for one test."""
    source = python_blocks('CONTRIBUTING.md', 'Extend: a structure builder')[0]
    assert len(source.splitlines()) <= 33
    exec(compile(source, 'my_builder.py', 'exec'), {})
    yield
    del BUILDERS['city_block']


@pytest.mark.usefixtures('city_block')
def test_the_builder_of_contributing() -> None:
    """Its groups, and a segmentor that is compressed by them."""
    grid = (5, 7)
    centres = torch.zeros(35, dtype=torch.bool)
    centres[[3, 16, 20, 34]] = True
    group = BUILDERS['city_block'](centres, grid)
    where = [divmod(i, 7) for i in (3, 16, 20, 34)]
    for token, number in enumerate(group.tolist()):
        row, column = divmod(token, 7)
        steps = [abs(row - r) + abs(column - c) for r, c in where]
        assert steps[number] == min(steps)
    assert group[[3, 16, 20, 34]].tolist() == [0, 1, 2, 3]

    model = tiny.build(builder='city_block', centres='spread')
    compress(model, [tiny.batch(0, 2)], num_batches=1)
    images = torch.randn(1, 3, 96, 64)
    assert model.eval()(images, mode='tensor').shape == (1, 5, 6, 4)


def test_the_config_of_contributing() -> None:
    block = python_blocks('CONTRIBUTING.md', 'Extend: a structure builder')[1]
    cfg = Config.fromstring(block.replace(", 'my_builder'", ''), '.py')
    assert cfg.model.backbone.compression.builder == 'city_block'


def test_the_profile_of_contributing(capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    (source,) = python_blocks('CONTRIBUTING.md', 'Profile')
    exec(compile(source, 'profile.py', 'exec'), {})
    assert 'Self CPU' in capsys.readouterr().out
