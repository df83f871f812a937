"""Token maps: merge patch tokens by position, restore the full map.

A token map of one layer splits the N patch tokens of a grid into K groups.
The P prefix tokens are groups of their own and pass through unchanged. With
merge weights ``m`` and restore weights ``r``, both 0 for a *pruned* token::

    merge                 z_k  = sum_{n in group k} m_n x_n
    layer                 y    = layer(z)
    restore 'replace'     x'_n = r_n y_g(n)                    (pruned: x_n)
    restore 'residual'    x'_n = x_n + r_n (y_g(n) - z_g(n))

'replace' is the merge, reconstruct and shortcut of Mao et al. (arXiv
2503.23455, section 3). There they are products with matrices, which is what
:class:`DenseTokenMap` does: because the rows of the merge matrix have disjoint
supports, a weighted sum and a look-up do the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .merging import Grid
from .structure import PRUNED, group_weights


@dataclass(frozen=True)
class TokenMap:
    """Every token belongs to one group, or is pruned.

    Prefix tokens come first, each alone in its group with both weights 1.

    Attributes:
        place (Tensor): Merged token each token goes to, int64, (P+N,).
        num_merged (int): P+K.
        merge_weight (Tensor): ``m``, (P+N,).
        restore_weight (Tensor): ``r``, (P+N,).
        live (Tensor, optional): Which tokens are not pruned, bool, (P+N,).
            None if none is.
        residual (bool): Whether it restores 'residual', not 'replace'.
    """

    place: Tensor
    num_merged: int
    merge_weight: Tensor
    restore_weight: Tensor
    live: Tensor | None = None
    residual: bool = False

    def merge(self, x: Tensor) -> Tensor:
        """Merge tokens, (B, P+N, C) -> (B, P+K, C).

        A sum where nothing is compiled or exported, and there a product with
        the merge matrix: no export format lacks that.

        Raises:
            ValueError: If ``x`` does not have P+N tokens.
        """
        _check_tokens(x, self.place.numel(), 'merge')
        if torch.compiler.is_compiling():
            return _full_product(self._merge_matrix(), x)
        rows = x * self.merge_weight.to(x.dtype).unsqueeze(1)
        merged = x.new_zeros(len(x), self.num_merged, x.shape[2])
        return merged.index_add(1, self.place, rows)

    def restore(self, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """Bring a layer's output back to all tokens.

        Args:
            x (Tensor): Tokens before the merge, (B, P+N, C).
            z (Tensor): ``merge(x)``, (B, P+K, C).
            y (Tensor): The layer's output for ``z``, (B, P+K, C).

        Returns:
            Tensor: (B, P+N, C).

        Raises:
            ValueError: If ``x`` or ``y`` have another number of tokens.
        """
        _check_tokens(x, self.place.numel(), 'restore')
        _check_tokens(y, self.num_merged, 'restore')
        rows = (y - z if self.residual else y).index_select(1, self.place)
        rows = rows * self.restore_weight.to(rows.dtype).unsqueeze(1)
        if self.residual:
            return x + rows
        if self.live is None:
            return rows
        return torch.where(self.live.unsqueeze(1), rows, x)

    def groups(self, num_prefix: int) -> Tensor:
        """Group of each patch token, 0..K-1, -1 if pruned, int64, (N,)."""
        group = self.place[num_prefix:] - num_prefix
        if self.live is None:
            return group
        return torch.where(self.live[num_prefix:], group, PRUNED)

    def to_dense(self) -> DenseTokenMap:
        """The same map as a pair of matrices."""
        live = self.live
        if live is None:
            live = torch.ones_like(self.place, dtype=torch.bool)
        restore = self._member().mT * self.restore_weight.unsqueeze(1)
        return DenseTokenMap(
            self._merge_matrix(), restore, live, self.residual
        )

    def _merge_matrix(self) -> Tensor:
        return self._member() * self.merge_weight

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
        live (Tensor): Which tokens the shortcut ``diag(1 - live)`` does not
            keep, bool, (P+N,).
        residual (bool): Whether ``x' = x + R (y - z)``, not
            ``x' = R y + (1 - live) x``.
    """

    merge_matrix: Tensor
    restore_matrix: Tensor
    live: Tensor
    residual: bool = False

    @property
    def num_merged(self) -> int:
        """P+K."""
        return self.merge_matrix.shape[0]

    def merge(self, x: Tensor) -> Tensor:
        """Merge tokens, see :meth:`TokenMap.merge`."""
        _check_tokens(x, self.merge_matrix.shape[1], 'merge')
        return self.merge_matrix.to(x.dtype) @ x

    def restore(self, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """Restore tokens, see :meth:`TokenMap.restore`."""
        _check_tokens(x, self.merge_matrix.shape[1], 'restore')
        _check_tokens(y, self.num_merged, 'restore')
        matrix = self.restore_matrix.to(y.dtype)
        if self.residual:
            return x + matrix @ (y - z)
        return matrix @ y + (~self.live).to(x.dtype).unsqueeze(1) * x

    def groups(self, num_prefix: int) -> Tensor:
        """The group that reads most of each patch token, -1 if pruned."""
        group = self.merge_matrix[num_prefix:, num_prefix:].abs().argmax(0)
        return torch.where(self.live[num_prefix:], group, PRUNED)

    def resized(self, num_prefix: int, old: Grid, new: Grid) -> DenseTokenMap:
        """The map seen from another grid, with as many groups.

        The merge reads an area average of the new grid, the restore is
        interpolated.
        """

        def resize(matrix: Tensor) -> Tensor:
            first, patches = matrix.tensor_split([num_prefix], dim=1)
            return torch.cat([first, resize_rows(patches, old, new)], 1)

        first, patches = self.merge_matrix.tensor_split([num_prefix], dim=1)
        patches = patches * (old[0] * old[1] / (new[0] * new[1]))
        merge = torch.cat([first, patches], 1)
        live = self.live.unsqueeze(0).to(merge.dtype)
        return DenseTokenMap(
            resize(merge),
            resize(self.restore_matrix.mT).mT,
            resize(live)[0] > 0.5,
            self.residual,
        )


@dataclass(frozen=True)
class Structure:
    """Groups and initial weights of all layers on one grid.

    Attributes:
        place (Tensor): Merged token of each token, int64, (L, P+N).
        live (Tensor): Tokens that are not pruned, bool, (L, P+N).
        counts (tuple[int, ...]): Groups K of each layer.
        pruned (tuple[int, ...]): Pruned tokens of each layer.
        merge, restore (Tensor): Weights of patch tokens, (L, N).
    """

    place: Tensor
    live: Tensor
    counts: tuple[int, ...]
    pruned: tuple[int, ...]
    merge: Tensor
    restore: Tensor

    def token_map(
        self,
        layer: int,
        merge: Tensor,
        restore: Tensor,
        residual: bool = False,
    ) -> TokenMap:
        """Map of one layer, from the weights of all patches, (L, N) each."""
        live = self.live[layer]
        prefix = len(live) - merge.shape[1]
        return TokenMap(
            self.place[layer],
            prefix + self.counts[layer],
            F.pad(merge[layer], (prefix, 0), value=1.0) * live,
            F.pad(restore[layer], (prefix, 0), value=1.0) * live,
            live if self.pruned[layer] else None,
            residual,
        )

    def carry_over(
        self,
        native: Structure,
        weights: Sequence[Tensor],
        old: Grid,
        new: Grid,
    ) -> list[Tensor]:
        """Weights learned on the native grid, merge and restore, (L, N) each.

        The initial ones of this grid plus, resized, what was learned.
        """
        live = native.live[:, -weights[0].shape[1] :]
        return [
            here + resize_rows((weight - there) * live, old, new)
            for here, there, weight in zip(
                (self.merge, self.restore),
                (native.merge, native.restore),
                weights,
            )
        ]


def make_structure(
    group: Tensor,
    scores: Tensor,
    layers: Sequence[int],
    weights: str,
    num_prefix: int,
    device: torch.device,
) -> Structure:
    """What a model needs of its groups, on its device.

    Args:
        group (Tensor): Group of each token, -1 if pruned, int64, (L, N).
        scores (Tensor): Normalised scores of the compressed layers.
        layers (Sequence[int]): Which those are; the weights of others are 1.
        weights (str): See :func:`group_weights`.
        num_prefix (int): P.
        device (torch.device): Where to put it.
    """
    merge, restore = torch.ones(group.shape), torch.ones(group.shape)
    for layer, row in zip(layers, scores):
        merge[layer], restore[layer] = group_weights(
            row, group[layer], weights
        )
    place = F.pad(group.clamp_min(0) + num_prefix, (num_prefix, 0))
    place[:, :num_prefix] = torch.arange(num_prefix)
    live = F.pad(group != PRUNED, (num_prefix, 0), value=True)
    return Structure(
        place.to(device),
        live.to(device),
        tuple((group.amax(1) + 1).tolist()),
        tuple((group == PRUNED).sum(1).tolist()),
        merge.to(device),
        restore.to(device),
    )


def resize_rows(rows: Tensor, old: Grid, new: Grid) -> Tensor:
    """Bilinear resize of values of tokens, (R, h*w) -> (R, h'*w')."""
    maps = rows.unflatten(1, old).unsqueeze(0)
    maps = F.interpolate(maps, size=new, mode='bilinear', align_corners=False)
    return maps.squeeze(0).flatten(1)


def _check_tokens(x: Tensor, expected: int, what: str) -> None:
    if x.dim() != 3 or x.shape[1] != expected:
        raise ValueError(
            f'{what} expects (B, {expected}, C), got {tuple(x.shape)}; '
            'a token map fits one grid and one number of prefix tokens only'
        )


def _full_product(matrix: Tensor, x: Tensor) -> Tensor:
    """``matrix @ x`` in the dtype of ``x``, whatever autocast does.

    Autocast is entered only where there is one: exports would trace it.
    """
    matrix, device = matrix.to(x.dtype), x.device.type
    if not torch.is_autocast_enabled(device):
        return matrix @ x
    with torch.autocast(device, enabled=False):
        return matrix @ x
