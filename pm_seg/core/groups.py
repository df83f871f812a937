"""The groups that tokens ended in, for a decoder to work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .rows import spread_rows, sum_rows

if TYPE_CHECKING:
    from .merging import Merge


@dataclass
class TokenGroups:
    """The groups that the last layer worked on.

    Attributes:
        merges (Sequence[Merge]): One after the other.
        size (Tensor): Patches in each group, (B, P+K, 1).
        num_prefix (int): P.
    """

    merges: Sequence[Merge]
    size: Tensor
    num_prefix: int
    _place: Tensor | None = None

    @property
    def place(self) -> Tensor:
        """Group of each patch token, 0..K-1, int64, (B, N)."""
        if self._place is None:  # cached_property would lock; no compiling
            places = (merge.place for merge in self.merges)
            place, *others = (p[:, self.num_prefix :] for p in places)
            for following in others:
                place = following.gather(1, place - self.num_prefix)
            self._place = place - self.num_prefix
        return self._place

    def mean(self, x: Tensor) -> Tensor:
        """Mean of each group, (B, N, C) -> (B, K, C)."""
        size = self.size[:, self.num_prefix :]
        return sum_rows(x, self.place, size.shape[1]) / size.to(x.dtype)

    def spread(self, z: Tensor) -> Tensor:
        """What the group of each token holds, (B, K, C) -> (B, N, C)."""
        return spread_rows(z, self.place)
