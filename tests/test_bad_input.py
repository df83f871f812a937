"""Bad input and faults: a clear message, nothing written, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_input import CASES, Workspace, message

MAX_LENGTH = 1200


@pytest.fixture(scope='module')
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp('workspace'))


@pytest.mark.parametrize('name', CASES)
def test_message(name: str, workspace: Workspace) -> None:
    case = CASES[name]
    before = workspace.files()
    text = message(workspace, name)
    after = workspace.files()
    for part in case.says:
        any_of = (part,) if isinstance(part, str) else part
        assert any(each in text for each in any_of), (part, text)
    assert len(text) < MAX_LENGTH, text
    assert before.items() <= after.items()
    assert set(after) - set(before) <= set(case.leaves)
    workspace.tidy()


def test_the_page_has_all_messages() -> None:
    page = Path(__file__).parents[1] / 'docs/robustness.md'
    text = page.read_text()
    for case in CASES.values():
        assert f'| {case.what} |' in text
