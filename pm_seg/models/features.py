"""What a backbone hands to heads beside its maps."""

from __future__ import annotations

from collections.abc import Iterable

from ..core import TokenGroups


class FeatureMaps(tuple):
    """A tuple of feature maps that knows the groups its tokens came from.

    To everything that expects the tuple of a backbone it is one; a head that
    wants to work on as few tokens as the backbone's last layer asks for
    ``groups``.

    Attributes:
        groups (TokenGroups, optional): None if there are none.
    """

    groups: TokenGroups | None

    def __new__(
        cls, maps: Iterable, groups: TokenGroups | None = None
    ) -> FeatureMaps:
        features = super().__new__(cls, maps)
        features.groups = groups
        return features
