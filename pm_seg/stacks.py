"""Which OpenMMLab packages are installed, and whether they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

#: Distributions that install each import name, the maintained fork first.
DISTRIBUTIONS: dict[str, tuple[str, ...]] = {
    'mmcv': ('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    'mmengine': ('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    'mmseg': ('onedl-mmsegmentation', 'mmsegmentation'),
    'mmpretrain': ('onedl-mmpretrain', 'mmpretrain', 'mmcls'),
}


@dataclass(frozen=True)
class Stacks:
    """Versions of the installed distributions, by the import name of each."""

    found: Mapping[str, Mapping[str, str]]

    @property
    def versions(self) -> dict[str, str]:
        """Version of every distribution that is installed."""
        return {d: v for each in self.found.values() for d, v in each.items()}

    @property
    def conflicts(self) -> dict[str, list[str]]:
        """Import names with several distributions, and these."""
        return {
            name: list(owners)
            for name, owners in self.found.items()
            if len(owners) > 1
        }

    @property
    def mixed(self) -> bool:
        """Whether packages of both stacks are there."""
        return len({d.startswith('onedl-') for d in self.versions}) > 1

    @property
    def kind(self) -> str:
        """Which stack this is, in a few words."""
        if not self.versions:
            return 'not installed'
        if self.problem():
            return f'MIXED: {", ".join(self.versions)}'
        kind = 'original OpenMMLab'
        if next(iter(self.versions)).startswith('onedl-'):
            kind = 'onedl-* (the maintained forks)'
        whole = all(self.found.values())
        return kind if whole else f'{kind}, not all packages'

    def problem(self) -> str | None:
        """What is wrong and how to mend it, None if nothing is."""
        if self.conflicts:
            name, owners = next(iter(self.conflicts.items()))
            both = ' and '.join(owners)
            what = f'{both} own the same files, those of {name}'
        elif self.mixed:
            forks = 'the onedl-* forks'
            what = f'{forks} and the original OpenMMLab packages are mixed'
        else:
            return None
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
    return Stacks(
        {
            name: {d: found for d in known if (found := version(d))}
            for name, known in DISTRIBUTIONS.items()
        }
    )
