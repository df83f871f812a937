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

    def of(self, name: str) -> dict[str, str]:
        """Versions of the distributions that install an import name."""
        return {**self.forks[name], **self.originals[name]}

    @property
    def versions(self) -> dict[str, str]:
        """Version of every distribution that is installed."""
        groups = (*self.forks.values(), *self.originals.values())
        return {name: v for found in groups for name, v in found.items()}

    @property
    def conflicts(self) -> dict[str, list[str]]:
        """Import names with several distributions, and these."""
        both = {name: list(self.of(name)) for name in DISTRIBUTIONS}
        return {name: found for name, found in both.items() if len(found) > 1}

    @property
    def mixed(self) -> bool:
        """Whether packages of both stacks are there."""
        return any(self.forks.values()) and any(self.originals.values())

    @property
    def kind(self) -> str:
        """Which stack this is, in a few words."""
        if not self.versions:
            return 'not installed'
        if self.problem():
            return f'MIXED: {", ".join(self.versions)}'
        kind = 'original OpenMMLab'
        if any(self.forks.values()):
            kind = 'onedl-* (the maintained forks)'
        whole = all(map(self.of, DISTRIBUTIONS))
        return kind if whole else f'{kind}, not all packages'

    def problem(self) -> str | None:
        """What is wrong and how to mend it, None if nothing is."""
        if not self.mixed and not self.conflicts:
            return None
        what = (
            'the onedl-* forks and the original OpenMMLab packages are mixed'
        )
        if self.conflicts:
            name, owners = next(iter(self.conflicts.items()))
            what = f'{" and ".join(owners)} own the same files, those of'
            what += f' {name}'
        found = ', '.join(f'{name}=={v}' for name, v in self.versions.items())
        return (
            f'{what}; expected one stack alone, found {found}. Remove all of '
            'them and install one: pip uninstall -y '
            f'{" ".join(sorted(self.versions))} && pip install -r '
            'requirements/mminstall.txt'
        )


def version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def installed_stacks() -> Stacks:
    """Look for the distributions of both stacks, by their metadata."""

    def find(stack: int) -> dict[str, dict[str, str]]:
        return {
            name: {d: found for d in both[stack] if (found := version(d))}
            for name, both in DISTRIBUTIONS.items()
        }

    return Stacks(find(0), find(1))
