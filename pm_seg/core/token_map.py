"""Token maps: the paper's merge, reconstruct and shortcut of one layer.

A token map splits the N patch tokens of a grid into K groups. The P prefix
tokens are groups of their own and pass through unchanged. With merge weights
``m`` and restore weights ``r``, both 0 for a *pruned* token (Mao et al., arXiv
2503.23455, section 3)::

    merge      z_k  = sum_{n in group k} m_n x_n
    layer      y    = layer(z)
    restore    x'_n = r_n y_g(n)                    (pruned: x_n)

In the paper they are products with matrices, as in :class:`DenseTokenMap`;
where groups are disjoint, a weighted sum and a look-up do the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .merging import Grid
from .rows import full_precision, sum_rows
from .structure import PRUNED


@dataclass(frozen=True)
class TokenMap:
    """Every token belongs to one group, or is pruned.

    Prefix tokens come first, each alone in its group with both weights 1.

    Attributes:
        place (Tensor): Merged token each token goes to, int64, (P+N,).
        num_merged (int): P+K.
        merge_weight (Tensor): ``m``, (P+N,).
        restore_weight (Tensor): ``r``, (P+N,).
        live (Tensor): Which tokens are not pruned, bool, (P+N,).
    """

    place: Tensor
    num_merged: int
    merge_weight: Tensor
    restore_weight: Tensor
    live: Tensor

    @classmethod
    def of_groups(
        cls,
        group: Tensor,
        num_groups: int,
        merge: Tensor,
        restore: Tensor,
        num_prefix: int,
    ) -> TokenMap:
        """From groups 0..K-1, -1 if pruned, and weights of patches, (N,)."""
        prefix = torch.arange(num_prefix, device=group.device)
        live = F.pad(group != PRUNED, (num_prefix, 0), value=True)
        return cls(
            torch.cat([prefix, group.clamp_min(0) + num_prefix]),
            num_prefix + num_groups,
            F.pad(merge, (num_prefix, 0), value=1.0) * live,
            F.pad(restore, (num_prefix, 0), value=1.0) * live,
            live,
        )

    def merge(self, x: Tensor) -> Tensor:
        """Merge tokens, (B, P+N, C) -> (B, P+K, C)."""
        if torch.compiler.is_compiling():  # no export format lacks a product
            with full_precision(x):
                return self.merge_matrix.to(x.dtype) @ x
        rows = x * self.merge_weight.to(x.dtype).unsqueeze(1)
        merged = x.new_zeros(len(x), self.num_merged, x.shape[2])
        return merged.index_add(1, self.place, rows)

    def restore(self, x: Tensor, y: Tensor) -> Tensor:
        """Bring a layer's output for ``merge(x)``, (B, P+K, C), back to all
        tokens, ``x`` before the merge, (B, P+N, C)."""
        rows = y.index_select(1, self.place)
        rows = rows * self.restore_weight.to(rows.dtype).unsqueeze(1)
        return torch.where(self.live.unsqueeze(1), rows, x)

    def groups(self, num_prefix: int) -> Tensor:
        """Group of each patch token, 0..K-1, -1 if pruned, int64, (N,)."""
        group = self.place[num_prefix:] - num_prefix
        return torch.where(self.live[num_prefix:], group, PRUNED)

    def to_dense(self) -> DenseTokenMap:
        """The same map as a pair of matrices."""
        return DenseTokenMap(self.merge_matrix, self.restore_matrix, self.live)

    @property
    def merge_matrix(self) -> Tensor:
        """M, (P+K, P+N)."""
        return self._member() * self.merge_weight

    @property
    def restore_matrix(self) -> Tensor:
        """R, (P+N, P+K)."""
        return self._member().mT * self.restore_weight.unsqueeze(1)

    def _member(self) -> Tensor:
        """Which token goes to which merged one, bool, (P+K, P+N)."""
        merged = torch.arange(self.num_merged, device=self.place.device)
        return merged.unsqueeze(1) == self.place


@dataclass(frozen=True)
class DenseTokenMap:
    """Token map as full matrices, the form in which the release trains.

    Off-support entries may be non-zero and prefix tokens may take part, which
    is what a trained release checkpoint contains.

    Attributes:
        merge_matrix (Tensor): M, (P+K, P+N).
        restore_matrix (Tensor): R, (P+N, P+K).
        live (Tensor): Which tokens the shortcut ``x' = R y + (1 - live) x``
            leaves out, bool, (P+N,).
    """

    merge_matrix: Tensor
    restore_matrix: Tensor
    live: Tensor

    @property
    def num_merged(self) -> int:
        """P+K."""
        return self.merge_matrix.shape[0]

    def merge(self, x: Tensor) -> Tensor:
        """Merge tokens, see :meth:`TokenMap.merge`."""
        return self.merge_matrix.to(x.dtype) @ x

    def restore(self, x: Tensor, y: Tensor) -> Tensor:
        """Restore tokens, see :meth:`TokenMap.restore`."""
        bypass = (~self.live).to(x.dtype).unsqueeze(1)
        return self.restore_matrix.to(y.dtype) @ y + bypass * x

    def groups(self, num_prefix: int) -> Tensor:
        """The group that reads most of each patch token, -1 if pruned."""
        group = self.merge_matrix[num_prefix:, num_prefix:].abs().argmax(0)
        return torch.where(self.live[num_prefix:], group, PRUNED)


def on_grid(
    token_map: TokenMap | DenseTokenMap, num_prefix: int, old: Grid, new: Grid
) -> TokenMap | DenseTokenMap:
    """The map seen from another grid, with as many groups: the merge reads an
    area average of it, the restore is interpolated, both bilinearly."""
    if old == new:
        return token_map

    def resize(rows: Tensor) -> Tensor:
        """(R, P+N) -> (R, P+N')."""
        first, patches = rows.tensor_split([num_prefix], dim=1)
        maps = patches.unflatten(1, old).unsqueeze(0)
        maps = F.interpolate(maps, new, mode='bilinear')
        return torch.cat([first, maps.squeeze(0).flatten(1)], 1)

    merge = token_map.merge_matrix
    area = torch.ones_like(merge[:1])
    area[:, num_prefix:] = old[0] * old[1] / (new[0] * new[1])
    live = token_map.live.unsqueeze(0).to(merge.dtype)
    return DenseTokenMap(
        resize(merge * area),
        resize(token_map.restore_matrix.mT).mT,
        resize(live)[0] > 0.499,  # halves, which runtimes round, are live
    )


def group_means(
    token_map: TokenMap | DenseTokenMap, rows: Tensor, num_prefix: int
) -> Tensor:
    """Mean of the patches of each group, (..., N, E) -> (..., K, E)."""
    group = token_map.groups(num_prefix)
    each = rows.reshape(-1, *rows.shape[-2:])
    live = (group != PRUNED).to(rows.dtype).view(1, -1, 1)
    place = group.clamp_min(0).expand(len(each), -1)
    groups = token_map.num_merged - num_prefix
    total = sum_rows(each * live, place, groups)
    count = sum_rows(live, place[:1], groups).clamp_min(1)
    return (total / count).view(*rows.shape[:-2], groups, -1)
