"""Merging similar tokens of each image, and undoing it.

T patch tokens of each image go to K and back; the P prefix tokens in front
never take part::

    merge     z_k = sum s_n x_n / sum s_n          over the members of group k
    restore   x'_n = x_n + r_k (y_k - z_k)         y: what layers made of z

with sizes s, the number of patches that a token stands for, and a gain r, 1
for groups of one. Every token keeps what told it apart from its group
('residual'); 'replace', ``x'_n = y_k``, is how ToMe-like methods unmerge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import add_rows, extra_of, spread_rows, sum_rows, take_rows

Grid = tuple[int, int]
RESTORES = ('residual', 'replace')


@dataclass(frozen=True)
class Merge:
    """Which of T patch tokens of each image go where among K.

    Indices are int64; rows count through the tokens of all images.

    Attributes:
        kept (Tensor): Row that each merged token starts from, (B * (P+K),).
        moved (Tensor): Rows that are averaged into others, (B * R,).
        into (Tensor): The merged rows they go to, (B * R,).
        rows (Tensor): Merged row of each token, (B, P+T).
    """

    kept: Tensor
    moved: Tensor
    into: Tensor
    rows: Tensor

    @property
    def place(self) -> Tensor:
        """Merged token of each token, within its image, (B, P+T)."""
        batch = len(self.rows)
        image = torch.arange(batch, device=self.rows.device).unsqueeze(1)
        return self.rows - image * (len(self.kept) // batch)

    def merge(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of each group, weighted by size: tokens (B, P+T, C) and the
        patches each stands for, (B, P+T, 1), to (B, P+K, C) and (B, P+K, 1).
        """
        total, _, share = self.sizes(size)
        return self.mean(x, share), total

    def sizes(self, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What becomes of sizes, (B, P+T, 1): size of each merged token and
        of the one it starts from, (B, P+K, 1) each; of each row that moves,
        its share of where it goes, (B * R, 1)."""
        batch, size = len(size), size.flatten(0, 1)
        moved = size.index_select(0, self.moved)
        start = size.index_select(0, self.kept)
        total = add_rows(start.clone(), self.into, moved, batch)
        share = moved / total.index_select(0, self.into)
        total, start = (t.unflatten(0, (batch, -1)) for t in (total, start))
        return total, start, share

    def mean(self, x: Tensor, share: Tensor) -> Tensor:
        """Means of groups, (B, P+T, C) -> (B, P+K, C). Only what moves is
        computed: groups start as one of their members and get
        ``share * (member - start)`` from each other one."""
        batch, x = len(x), x.flatten(0, 1)
        start = x.index_select(0, self.kept)
        update = x.index_select(0, self.moved)
        update = update - start.index_select(0, self.into)
        merged = add_rows(start, self.into, update * share.to(x.dtype), batch)
        return merged.unflatten(0, (batch, -1))

    def restore(
        self, before: Tensor, merged: Tensor, after: Tensor, gain: Tensor
    ) -> Tensor:
        """What each token was plus what its group gained since the merge.

        Args:
            before (Tensor): What was merged, (B, P+T, C).
            merged (Tensor): What it became, (B, P+K, C).
            after (Tensor): What layers made of that, (B, P+K, C).
            gain (Tensor): Factor of what a group gained, (B, P+K, 1).

        Returns:
            Tensor: (B, P+T, C).
        """
        gained = (after - merged) * gain.to(after.dtype)
        return before + self.spread(gained)

    def spread(self, z: Tensor) -> Tensor:
        """What the group of each token holds, (B, P+K, C) -> (B, P+T, C)."""
        return take_rows(z, self.rows)


@dataclass
class TokenGroups:
    """The groups that the last layer worked on, for a decoder to work on.

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
            place, *others = (merge.place for merge in self.merges)
            for following in others:
                place = following.gather(1, place)
            self._place = place[:, self.num_prefix :] - self.num_prefix
        return self._place

    def mean(self, x: Tensor) -> Tensor:
        """Mean of each group, (B, N, C) -> (B, K, C)."""
        size = self.size[:, self.num_prefix :]
        return sum_rows(x, self.place, size.shape[1]) / size.to(x.dtype)

    def spread(self, z: Tensor) -> Tensor:
        """What the group of each token holds, (B, K, C) -> (B, N, C)."""
        return spread_rows(z, self.place)


class Chain:
    """Tokens on their way through the layers, and the merges on that way.

    Args:
        x (Tensor): (B, P+N, C).
        num_prefix (int): P.
        extra (Tensor, optional): As of ``Compressor.run``.
        size_aware (bool): Whether layers are to know sizes. Defaults to True.

    Attributes:
        x (Tensor): Tokens now, (B, P+T, C).
        size (Tensor): Patches each stands for, float32, (B, P+T, 1).
        log_size (Tensor): For attention, (B, P+T); None as long as all stand
            for one, or layers are not to know.
        steps (list): Merges so far; with each what merged, what it became,
            and the gain, see :meth:`Merge.restore`.
    """

    def __init__(
        self,
        x: Tensor,
        num_prefix: int,
        extra: Tensor | None = None,
        size_aware: bool = True,
    ) -> None:
        self.x, self.num_prefix = x, num_prefix
        self.extra, self.size_aware = extra, size_aware
        self._rows: Tensor | None = None  # extra of merged tokens
        self.size = torch.ones(*x.shape[:2], 1, device=x.device)
        self.log_size: Tensor | None = None
        self.steps: list[tuple[Merge, Tensor, Tensor, Tensor]] = []

    @property
    def tokens(self) -> int:
        """T, patch tokens there are now."""
        return self.x.shape[1] - self.num_prefix

    def merge(self, merge: Merge, gain: Tensor) -> None:
        """Go on with fewer tokens. What groups of several gain is restored
        with this factor, a scalar, all of it to a token that stays alone."""
        before = self.x
        self.size, start, share = merge.sizes(self.size)
        if self.size_aware:
            self.log_size = self.size.squeeze(2).log()
        self.x = merge.mean(before, share)
        if self.extra is not None:
            if self._rows is None:
                rows = self.extra.reshape(-1, *self.extra.shape[-2:])
                rows = rows.transpose(0, 1).flatten(1)  # (N, all channels)
                rows = F.pad(rows, (0, 0, self.num_prefix, 0))
                self._rows = rows.expand(len(before), -1, -1)
            self._rows = merge.mean(self._rows, share)
        gain = torch.where(self.size != start, gain, 1.0)
        self.steps.append((merge, before, self.x, gain))

    def inputs_of(self, layer: int) -> tuple[Tensor | None, ...]:
        """What a layer is called with: tokens, their sizes, their extras.

        Of groups the means of their patches, each counted once: (N, E)
        becomes (B, 1, T, E), (heads, N, E) of a layer (B, heads, T, E).
        """
        if self._rows is None:
            return self.x, self.log_size, *extra_of(self.extra, layer)
        rows = self._rows[:, self.num_prefix :]
        rows = rows.unflatten(2, (-1, self.extra.shape[-1])).transpose(1, 2)
        if self.extra.dim() > 2:
            heads = self.extra.shape[1]
            rows = rows[:, layer * heads : (layer + 1) * heads]
        return self.x, self.log_size, rows

    def restored(self, kind: str) -> Tensor:
        """All tokens as they are now, (B, P+N, C), by one of RESTORES."""
        x = self.x
        for merge, before, merged, gain in reversed(self.steps):
            if kind == 'residual':
                x = merge.restore(before, merged, x, gain)
            else:
                x = merge.spread(x)
        return x

    def groups(self) -> TokenGroups | None:
        """What the tokens are groups of, None as long as all are alone."""
        if not self.steps:
            return None
        merges = [step[0] for step in self.steps]
        return TokenGroups(merges, self.size, self.num_prefix)
