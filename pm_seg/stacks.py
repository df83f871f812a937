"""Which OpenMMLab packages are installed, and whether they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

#: Distributions that install each import name: the maintained forks and the
#: original packages.
DISTRIBUTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'mmcv': (('onedl-mmcv',), ('mmcv', 'mmcv-lite', 'mmcv-full')),
    'mmengine': (('onedl-mmengine',), ('mmengine', 'mmengine-lite')),
    'mmseg': (('onedl-mmsegmentation',), ('mmsegmentation',)),
    'mmpretrain': (('onedl-mmpretrain',), ('mmpretrain', 'mmcls')),
}


@dataclass(frozen=True)
class Stacks:
    """What is installed.

    Attributes:
        forks, originals (dict[str, dict[str, str]]): Version of each
            installed distribution, by the import name it installs.
    """

    forks: Mapping[str, Mapping[str, str]]
    originals: Mapping[str, Mapping[str, str]]

    @property
    def conflicts(self) -> dict[str, list[str]]:
        """Import names with several distributions, and these."""
        both = {
            name: [*self.forks[name], *self.originals[name]]
            for name in DISTRIBUTIONS
        }
        return {name: found for name, found in both.items() if len(found) > 1}

    @property
    def mixed(self) -> bool:
        """Whether packages of both stacks are there."""
        return any(self.forks.values()) and any(self.originals.values())

    @property
    def kind(self) -> str:
        """Which stack this is, in a few words."""
        present = [
            name
            for name in DISTRIBUTIONS
            if self.forks[name] or self.originals[name]
        ]
        if not present:
            return 'not installed'
        if self.problem():
            return f'MIXED: {", ".join(self._versions)}'
        forks = any(self.forks.values())
        kind = (
            'onedl-* (the maintained forks)' if forks else 'original OpenMMLab'
        )
        whole = len(present) == len(DISTRIBUTIONS)
        return kind if whole else f'{kind}, not all packages'

    @property
    def _versions(self) -> dict[str, str]:
        """Version of every distribution that is installed."""
        groups = (*self.forks.values(), *self.originals.values())
        return {name: v for found in groups for name, v in found.items()}

    def problem(self) -> str | None:
        """What is wrong and how to mend it, None if nothing is."""
        if not self.mixed and not self.conflicts:
            return None
        installed = [f'{name}=={v}' for name, v in self._versions.items()]
        what = (
            f'{" and ".join(next(iter(self.conflicts.values())))} own the '
            f'same files, those of {next(iter(self.conflicts))}'
            if self.conflicts
            else 'the onedl-* forks and the original OpenMMLab packages are '
            'mixed'
        )
        names = ' '.join(sorted(self._versions))
        return (
            f'{what}; expected one stack alone, found '
            f'{", ".join(installed)}. Remove all of them and install one: '
            f'pip uninstall -y {names} && pip install -r '
            'requirements/mminstall.txt'
        )


def installed_stacks() -> Stacks:
    """Look for the distributions of both stacks, by their metadata."""

    def find(names: tuple[str, ...]) -> dict[str, str]:
        found = {}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return found

    return Stacks(
        {name: find(forks) for name, (forks, _) in DISTRIBUTIONS.items()},
        {name: find(own) for name, (_, own) in DISTRIBUTIONS.items()},
    )
