"""Both OpenMMLab stacks in one environment."""

from __future__ import annotations

from importlib import metadata

import pytest

from pm_seg.stacks import installed_stacks

FORKS = {
    'onedl-mmcv': '2.3.6',
    'onedl-mmengine': '0.10.12',
    'onedl-mmsegmentation': '1.4.2',
}
ORIGINALS = {'mmcv': '2.1.0', 'mmengine': '0.10.7', 'mmsegmentation': '1.2.2'}


@pytest.fixture
def install(monkeypatch):
    def install(*stacks: dict[str, str]) -> None:
        found = {name: v for stack in stacks for name, v in stack.items()}

        def version(name: str) -> str:
            if name not in found:
                raise metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(metadata, 'version', version)

    return install


@pytest.mark.parametrize('stack', [FORKS, ORIGINALS, {}])
def test_one_stack_is_fine(install, stack: dict[str, str]) -> None:
    install(stack)
    stacks = installed_stacks()
    assert not stacks.mixed and not stacks.conflicts
    assert stacks.problem() is None


def test_which_stack(install) -> None:
    install({})
    assert installed_stacks().kind == 'not installed'
    install(FORKS)
    partly = 'onedl-* (the maintained forks), not all packages'
    assert installed_stacks().kind == partly
    install(ORIGINALS, {'mmpretrain': '1.2.0'})
    assert installed_stacks().kind == 'original OpenMMLab'
    install(FORKS, {'mmcv': '2.1.0'})
    assert installed_stacks().kind.startswith('MIXED: onedl-mmcv, ')


def test_both_own_the_same_files(install) -> None:
    install(FORKS, {'mmcv': '2.1.0'})
    stacks = installed_stacks()
    assert stacks.mixed
    assert stacks.conflicts == {'mmcv': ['onedl-mmcv', 'mmcv']}
    problem = stacks.problem()
    assert problem.startswith('onedl-mmcv and mmcv own the same files')
    for part in ('mmcv==2.1.0', 'onedl-mmengine==0.10.12', 'pip uninstall -y'):
        assert part in problem


def test_mixed_without_conflict(install) -> None:
    forks = {k: v for k, v in FORKS.items() if k != 'onedl-mmcv'}
    install(forks, {'mmcv': '2.1.0'})
    stacks = installed_stacks()
    assert stacks.mixed and not stacks.conflicts
    assert 'are mixed; expected one stack alone' in stacks.problem()


def test_two_originals(install) -> None:
    install({**ORIGINALS, 'mmcv-lite': '2.1.0'})
    assert installed_stacks().conflicts == {'mmcv': ['mmcv', 'mmcv-lite']}


def test_this_environment() -> None:
    assert installed_stacks().problem() is None
