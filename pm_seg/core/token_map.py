"""Token maps: merge patch tokens into groups, restore the full map.

A token map of one block splits the N patch tokens of a ``h x w`` grid into K
groups. The P prefix tokens (class, distillation or class-embedding tokens)
are groups of their own and pass through unchanged. With merge weights ``m``
and restore weights ``r`` (both 0 for a *pruned* token)::

    merge                 z_k  = sum_{n in group k} m_n x_n
    block                 y    = block(z)
    restore 'replace'     x'_n = r_n y_g(n)                 (pruned: x_n)
    restore 'residual'    x'_n = x_n + r_n (y_g(n) - z_g(n))
                                 + U D (x_n - r_n z_g(n))   (with detail)

'replace' is the merge / reconstruct / shortcut of Mao et al., "Efficient
Token Compression for Vision Transformer with Spatial Information Preserved"
(arXiv 2503.23455, section 3): because the rows of the merge matrix have
disjoint supports, its products with the matrices are a weighted segment sum
and a gather. 'residual' adds the block's update to every token instead, so
that what distinguishes the members of a group survives the block. It survives
unchanged, though, as if the block did nothing to it; the *detail* path adds a
linear estimate of what the block would have done, with matrices U (C, R) and
D (R, C) of a low rank R that are shared by all tokens
(:mod:`pm_seg.core.detail` fits them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .matching import assign, match_down, sketch
from .segments import (
    Segments,
    image_gather,
    image_sizes,
    image_sum,
    segment_gather,
    segment_sum,
)

RESTORE_MODES = ('replace', 'residual')


def check_restore_mode(mode: str) -> str:
    """Return ``mode`` or raise ``ValueError`` if it is not a restore mode."""
    if mode not in RESTORE_MODES:
        raise ValueError(
            f'restore={mode!r} is unknown; choose one of {RESTORE_MODES}'
        )
    return mode


def _check_tokens(x: Tensor, expected: int, what: str) -> None:
    if x.dim() != 3 or x.shape[1] != expected:
        raise ValueError(
            f'{what} expects (B, {expected}, C), got {tuple(x.shape)}; '
            'a token map fits one grid and one number of prefix tokens only'
        )


def _detailed(
    detail: tuple[Tensor, Tensor] | None,
    x: Tensor,
    update: Tensor,
    z: Tensor,
    live: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The detail path, split into a part of groups and one of tokens."""
    if detail is None:
        return update, None
    down, up = (matrix.to(x.dtype) for matrix in detail)
    hidden = x @ down
    if live is not None:
        hidden = hidden * live.unsqueeze(-1)
    return update - z @ down @ up, hidden @ up


@dataclass(frozen=True)
class TokenMap:
    """Sparse token map: every token belongs to one group, or is pruned.

    Prefix tokens come first in the sequence, each as the only member of its
    group with both weights 1.

    Attributes:
        segments (Segments): Row of the merged sequence each token goes to.
        merge_weight (Tensor): ``m``, (P+N,).
        restore_weight (Tensor): ``r``, (P+N,).
        live (Tensor, optional): Which tokens are not pruned, bool, (P+N,).
            None if no token is pruned.
        mode (str): 'replace' or 'residual'.
        detail (tuple[Tensor, Tensor], optional): D (C, R) and U (R, C), both
            to be multiplied from the right; 'residual' only.
    """

    segments: Segments
    merge_weight: Tensor
    restore_weight: Tensor
    live: Tensor | None = None
    mode: str = 'residual'
    detail: tuple[Tensor, Tensor] | None = None

    def bind(self, x: Tensor) -> TokenMap:
        """The map for these tokens, (B, P+N, C): it is the same for all."""
        return self

    @property
    def slot(self) -> Tensor:
        """Row of the merged sequence each token goes to, int64, (P+N,)."""
        return self.segments.slot

    @property
    def num_slots(self) -> int:
        """P+K."""
        return self.segments.num_slots

    def merge(self, x: Tensor) -> Tensor:
        """Merge tokens.

        Args:
            x (Tensor): (B, P+N, C).

        Returns:
            Tensor: (B, P+K, C).

        Raises:
            ValueError: If ``x`` does not have P+N tokens.
        """
        _check_tokens(x, self.slot.numel(), 'merge')
        return segment_sum(x, self.merge_weight, self.segments)

    def restore(self, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """Bring a block's output back to all tokens.

        Args:
            x (Tensor): Tokens before the merge, (B, P+N, C).
            z (Tensor): ``merge(x)``, (B, P+K, C).
            y (Tensor): The block's output for ``z``, (B, P+K, C).

        Returns:
            Tensor: (B, P+N, C).

        Raises:
            ValueError: If ``x`` or ``y`` have another number of tokens.
        """
        _check_tokens(x, self.slot.numel(), 'restore')
        _check_tokens(y, self.num_slots, 'restore')
        if self.mode == 'replace':
            restored = segment_gather(y, self.restore_weight, self.segments)
            if self.live is None:
                return restored
            return torch.where(self.live.unsqueeze(-1), restored, x)
        update, extra = _detailed(self.detail, x, y - z, z, self.live)
        restored = segment_gather(update, self.restore_weight, self.segments)
        return x + restored if extra is None else x + extra + restored

    def spread(self, z: Tensor) -> Tensor:
        """What each token's group holds, (B, P+K, C) -> (B, P+N, C)."""
        return z.index_select(1, self.slot)

    def to_dense(self) -> DenseTokenMap:
        """The same map as a pair of matrices, without the detail path.

        Groups are in the order of the builder: row k of a merge here is row
        ``segments.given[k]`` there.
        """
        tokens = torch.arange(self.slot.numel(), device=self.slot.device)
        group = self.segments.given[self.slot]
        live = self.live
        if live is None:
            live = torch.ones_like(group, dtype=torch.bool)
        merge = self.merge_weight.new_zeros(self.num_slots, tokens.numel())
        merge = merge.index_put((group, tokens), self.merge_weight)
        restore = merge.new_zeros(tokens.numel(), self.num_slots)
        restore = restore.index_put((tokens, group), self.restore_weight)
        return DenseTokenMap(merge, restore, live, self.mode)


@dataclass(frozen=True)
class DenseTokenMap:
    """Token map as full matrices, the form in which the release trains.

    Off-support entries may be non-zero and prefix tokens may take part, which
    is what a trained release checkpoint contains.

    Attributes:
        merge_matrix (Tensor): M, (P+K, P+N).
        restore_matrix (Tensor): R, (P+N, P+K).
        live (Tensor): 1 where a token is restored from its group, 0 where the
            shortcut ``diag(1 - mask)`` keeps it, bool, (P+N,).
        mode (str): 'replace' (x' = R y + (1 - mask) x) or 'residual'
            (x' = x + R (y - z)).
    """

    merge_matrix: Tensor
    restore_matrix: Tensor
    live: Tensor
    mode: str = 'replace'

    def bind(self, x: Tensor) -> DenseTokenMap:
        """See :meth:`TokenMap.bind`."""
        return self

    @property
    def num_slots(self) -> int:
        """P+K."""
        return self.merge_matrix.shape[0]

    def merge(self, x: Tensor) -> Tensor:
        """Merge tokens, (B, P+N, C) -> (B, P+K, C)."""
        _check_tokens(x, self.merge_matrix.shape[1], 'merge')
        return self.merge_matrix.to(x.dtype) @ x

    def restore(self, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """Restore tokens, see :meth:`TokenMap.restore`."""
        _check_tokens(x, self.merge_matrix.shape[1], 'restore')
        _check_tokens(y, self.num_slots, 'restore')
        matrix = self.restore_matrix.to(x.dtype)
        if self.mode == 'residual':
            return matrix @ y + (x - matrix @ z)
        shortcut = (~self.live).to(x.dtype).unsqueeze(-1)
        return matrix @ y + shortcut * x


@dataclass(frozen=True)
class SimilarityMap:
    """Groups of similar tokens, found anew in every image by matching.

    Attributes:
        num_prefix (int): P.
        count (int): K, groups of each image.
        detail (tuple[Tensor, Tensor], optional): See :class:`TokenMap`.
    """

    num_prefix: int
    count: int
    detail: tuple[Tensor, Tensor] | None = None

    @property
    def num_slots(self) -> int:
        """P+K."""
        return self.num_prefix + self.count

    def bind(self, x: Tensor) -> ImageMap:
        """Match the tokens of each image, (B, P+N, C)."""
        group = match_down(x[:, self.num_prefix :], self.count)
        return ImageMap(
            _with_prefix(group, self.num_prefix),
            self.num_slots,
            detail=self.detail,
        )


@dataclass(frozen=True)
class AdaptiveMap:
    """Static groups that follow the content of every image.

    Each token moves to the most similar of the groups around it, as in
    superpixels, with the static groups as the start: the grid stays covered,
    and borders move to where the image has them.

    Attributes:
        segments (Segments): The static groups, of P+N tokens in P+K.
        num_prefix (int): P.
        merge_weight, restore_weight (Tensor): ``m`` and ``r``, (P+N,).
        signs (Tensor): Of the sketch tokens are compared in, (C,).
        candidates (Tensor): Groups each patch token can go to, numbered
            0..K-1, int64, (N, J).
        rounds (int): Times that tokens move.
        detail (tuple[Tensor, Tensor], optional): See :class:`TokenMap`.
    """

    segments: Segments
    num_prefix: int
    merge_weight: Tensor
    restore_weight: Tensor
    signs: Tensor
    candidates: Tensor
    rounds: int
    detail: tuple[Tensor, Tensor] | None = None

    @property
    def num_slots(self) -> int:
        """P+K."""
        return self.segments.num_slots

    def bind(self, x: Tensor) -> ImageMap:
        """Move the tokens of each image, (B, P+N, C).

        Raises:
            ValueError: If ``x`` does not have P+N tokens.
        """
        _check_tokens(x, self.segments.slot.numel(), 'bind')
        prefix = self.num_prefix
        with torch.no_grad():
            metric = sketch(x, self.signs)
            seeds = segment_sum(
                metric, torch.ones_like(metric[0, :, 0]), self.segments
            )
            group = assign(
                metric[:, prefix:],
                seeds[:, prefix:],
                self.candidates,
                self.rounds,
            )
        return ImageMap(
            _with_prefix(group, prefix),
            self.num_slots,
            self.merge_weight,
            self.restore_weight,
            self.detail,
        )


def _with_prefix(group: Tensor, num_prefix: int) -> Tensor:
    """Groups of patch tokens (B, N) to those of all tokens (B, P+N)."""
    first = torch.arange(num_prefix, device=group.device)
    first = first.expand(len(group), -1)
    return torch.cat([first, group + num_prefix], 1)


@dataclass(frozen=True)
class ImageMap:
    """A token map whose groups are those of given images; residual restore.

    Attributes:
        position (Tensor): Row of the merged sequence each token goes to,
            int64, (B, P+N).
        num_slots (int): P+K. Rows without tokens are zero.
        merge_weight, restore_weight (Tensor, optional): ``m`` and ``r``,
            (P+N,), or ones.
        detail (tuple[Tensor, Tensor], optional): See :class:`TokenMap`.
    """

    position: Tensor
    num_slots: int
    merge_weight: Tensor | None = None
    restore_weight: Tensor | None = None
    detail: tuple[Tensor, Tensor] | None = None
    live: None = None

    def merge(self, x: Tensor) -> Tensor:
        """Mean of each group's ``m_n x_n``, (B, P+N, C) -> (B, P+K, C)."""
        _check_tokens(x, self.position.shape[1], 'merge')
        if self.merge_weight is not None:
            x = x * self.merge_weight.to(x.dtype).unsqueeze(-1)
        total = image_sum(x, self.position, self.num_slots)
        sizes = image_sizes(x, self.position, self.num_slots)
        return total / sizes.clamp_min(1)

    def spread(self, z: Tensor) -> Tensor:
        """What each token's group holds, (B, P+K, C) -> (B, P+N, C)."""
        return image_gather(z, self.position)

    def restore(self, x: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """See :meth:`TokenMap.restore`."""
        _check_tokens(x, self.position.shape[1], 'restore')
        _check_tokens(y, self.num_slots, 'restore')
        update, extra = _detailed(self.detail, x, y - z, z)
        restored = self.spread(update)
        x = x if extra is None else x + extra
        if self.restore_weight is None:
            return x + restored
        weight = self.restore_weight.to(x.dtype).unsqueeze(-1)
        return torch.addcmul(x, restored, weight)
